"""`arcee-mlx inspect`: a checkpoint as a table for people, or as one JSON object for programs."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .results import Amount, Context, Inspection, Memory, TokenizerFacts, Weights
from .run import inspect_checkpoint

_INDENT = 12
_LABELS = 6  # by name
_BIASES = (("attention_bias", "attention"), ("mlp_bias", "MLP"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `inspect`."""
    parser.add_argument("checkpoint", metavar="PATH|ID", help="checkpoint folder or Hugging Face Hub id")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, for programs")
    parser.epilog = "Exit status: 0 if the checkpoint loads, 1 if it does not, 2 if there is none to be looked at."


def run(args: argparse.Namespace) -> int:
    """Runs `inspect` as parsed; returns 0 if the checkpoint loads and 1 if it does not."""
    inspection = inspect_checkpoint(args.checkpoint, args.revision)
    if args.json:
        print(json.dumps(inspection.to_dict(), allow_nan=False))
    else:
        print(describe(inspection, width=min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)))
    return 0 if inspection.loads else 1


def describe(inspection: Inspection, *, width: int = 100) -> str:
    """The inspection as aligned plain text, at most `width` characters wide where words can be broken."""
    lines = [_escape(inspection.name) + (f" at {inspection.commit}" if inspection.commit else ""), ""]
    for label, rows in _sections(inspection):
        for row in map(_escape, rows):
            wrapped = textwrap.wrap(row, width - _INDENT, subsequent_indent="  ", drop_whitespace=True) or [""]
            for line in wrapped if len(row) > width - _INDENT else [row]:
                lines.append(f"{label:<{_INDENT}}{line}".rstrip())
                label = ""
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Names and settings are the checkpoint's: what a terminal would act on is shown instead."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _sections(inspection: Inspection) -> Iterator[tuple[str, Sequence[str]]]:
    if inspection.config:
        yield "config", _describe_config(inspection.config)
    if inspection.context is not None:
        yield "rope", [_describe_rope(inspection.context)]
        yield "context", [f"{inspection.context.tokens:,} positions"]
    if inspection.weights is not None:
        yield "weights", _describe_weights(inspection.weights)
    if inspection.memory is not None and inspection.context is not None:
        yield "memory", [_describe_memory(inspection.memory, inspection.context)]
    if inspection.tokenizer is not None:
        yield "tokenizer", _describe_tokenizer(inspection.tokenizer)
        yield "template", [", ".join(inspection.tokenizer.chat_templates) or "none"]
    if inspection.sampling:
        yield "generation", [", ".join(f"{name} {value:g}" for name, value in inspection.sampling.items())]
    rows = [(name, size_words(file.size_bytes), file.use or "not read") for name, file in inspection.files.items()]
    yield "files", _align(rows, "<><") or ["none"]
    counts = {level: sum(f.level == level for f in inspection.findings) for level in ("error", "warning", "note")}
    words = ", ".join(f"{count} {level}{'s' * (count > 1)}" for level, count in counts.items() if count)
    findings = [f"{finding.level + ':':<9}{finding.topic}: {finding.text}" for finding in inspection.findings]
    yield "findings", findings or ["none"]
    yield "verdict", [("loads" if inspection.loads else "does not load") + (f" ({words})" if words else "")]


def _describe_config(config: Mapping[str, Any]) -> list[str]:
    """Three lines; what a config that cannot be run does not say is left out."""

    def number(key: str) -> str:
        value = config.get(key)
        return f"{value:,}" if isinstance(value, int) else "?"

    names = config.get("architectures") or []
    origin = [config.get("model_type", "no model_type"), *(names if isinstance(names, list) else [names])]
    origin.append(config.get("dtype") or config.get("torch_dtype"))
    if config.get("transformers_version"):
        origin.append(f"transformers {config['transformers_version']}")
    layout = config.get("down_proj_layout")
    is_by_neuron = isinstance(layout, Mapping) and layout.get("name") == "by_neuron"
    biases = " and ".join(name for key, name in _BIASES if config.get(key)) or "no"
    return [
        ", ".join(str(item) for item in origin if item),
        f"{number('num_hidden_layers')} layers of {number('hidden_size')}; MLP of {number('intermediate_size')}, "
        f"{config.get('hidden_act', '?')}; {number('num_attention_heads')} query heads on "
        f"{number('num_key_value_heads')} key-value heads of {number('head_dim')}"
        + ("; down projections by neuron" if is_by_neuron else ""),
        f"vocabulary of {number('vocab_size')}; {_describe_head(config)}; {biases} biases",
    ]


def _describe_head(config: Mapping[str, Any]) -> str:
    architectures, labels = config.get("architectures"), config.get("id2label")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if named == "ArceeModel":
        return "no head"
    if named == "ArceeForQuestionAnswering":
        return "a head for the first and the last token of an answer"
    if named in ("ArceeForSequenceClassification", "ArceeForTokenClassification"):
        names = list(map(str, labels.values())) if isinstance(labels, Mapping) else ["LABEL_0", "LABEL_1"]
        more = f" and {len(names) - _LABELS} more" if len(names) > _LABELS else ""
        problem = f", {config['problem_type']}" if config.get("problem_type") else ""
        return f"a head of {len(names)} label{'s' * (len(names) != 1)} ({', '.join(names[:_LABELS])}{more}){problem}"
    return f"head {'tied' if config.get('tie_word_embeddings') else 'not tied'} to the embedding"


def _describe_rope(context: Context) -> str:
    rope = dict(context.rope)
    words = [str(rope.pop("rope_type"))]
    for key, value in rope.items():
        if key == "type" or value is None:
            continue
        if isinstance(value, list):
            value = f"({len(value)} numbers)"
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        words.append(f"{key} {value}")
    if context.attention_factor != 1:
        words.append(f"scales cos and sin by {context.attention_factor:.5f}")
    return ", ".join(words)


def _describe_weights(weights: Weights) -> list[str]:
    total = weights.total
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in weights.dtypes.items())
    rows: list[tuple[str, ...]] = [("", "parameters", "tensors", "size", "bits", "stored as")]
    rows += [_amount_row(name, weights.parts[name], " + ".join(weights.part_forms[name])) for name in weights.parts]
    rows += [_amount_row("all", total, "")]
    files = f"{len(weights.files)} file{'s' * (len(weights.files) != 1)}"
    summary = (
        f"{count_words(total.parameters)} parameters in {size_words(total.size_bytes)}, "
        f"{total.bits_per_weight:.3f} bits per weight"
    )
    return [f"{summary}; {total.tensors} tensors ({dtypes}) in {files}", *_align(rows, "<>>>><")]


def _amount_row(name: str, amount: Amount, form: str) -> tuple[str, ...]:
    bits = f"{amount.bits_per_weight:.2f}"
    return name, f"{amount.parameters:,}", str(amount.tensors), size_words(amount.size_bytes), bits, form


def _describe_memory(memory: Memory, context: Context) -> str:
    return (
        f"{size_words(memory.weights_bytes)} weights + {size_words(1000 * memory.kv_bytes_per_token)} of KV cache (16 bits) "
        f"for each 1,000 tokens = {size_words(memory.full_context_bytes)} at {context.tokens:,} tokens"
    )


def _describe_tokenizer(facts: TokenizerFacts) -> list[str]:
    named = [
        f"{name.removesuffix('_token')} {text} {'(no id)' if token_id is None else token_id}"
        for name, (text, token_id) in facts.special_tokens.items()
    ]
    ends = ", ".join(f"{token_id} {text or '(no text)'}" for token_id, text in facts.eos_tokens.items()) or "nothing"
    return [
        f"{facts.kind}, {facts.vocab_size:,} ids; {', '.join(named) or 'no special tokens'}",
        f"answers end at {ends}",
    ]


def _align(rows: Sequence[Sequence[str]], sides: str) -> list[str]:
    """Rows as lines with columns of equal width, each to the left `<` or right `>`."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)).rstrip() for row in rows]


def size_words(size_bytes: int) -> str:
    """A size in decimal units, as disks and downloads are counted."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size_bytes >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} B"


def count_words(count: int) -> str:
    """A number of parameters, as models are named by it."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count:,}"
