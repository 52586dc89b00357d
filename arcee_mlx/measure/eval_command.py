"""`arcee-mlx eval`: how well a checkpoint predicts a text, how close it stays to another, how it does on lm-eval's tasks."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.adapters import read_adapter
from ..checkpoint.hub import resolve_folder
from ..checkpoint.opening import OpenedModel, open_model
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import ArceeError, InputError
from .evaluate import Comparison, compare, count_bytes
from .perplexity import Perplexity, measure_perplexity
from .sparsity_command import DEFAULT_TEXT
from .text import Windows, cut_windows, read_text
from .text_run import Progress, count_part

_WINDOWS, _WINDOW_TOKENS = 64, 512
_TEXT_OPTIONS = ("adapter_path", "text", "sequence_length", "stride", "num_samples", "reference")
_TASK_OPTIONS = ("num_shots", "limit", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face Hub id")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument("--adapter-path", metavar="PATH|ID", help="LoRA or DoRA adapter to put on, mlx-lm's or PEFT's")
    text = parser.add_argument_group("perplexity of a text, in overlapping windows that predict each token once")
    text.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: one of the package's)")
    text.add_argument(
        "--sequence-length", type=int, metavar="T", help=f"tokens of a window (default: {_WINDOW_TOKENS})"
    )
    text.add_argument(
        "--stride", type=int, metavar="N", help="tokens that a window predicts (default: T - 1, all it can)"
    )
    text.add_argument(
        "--num-samples", type=int, metavar="N", help=f"windows, spread over the text, -1 = all (default: {_WINDOWS})"
    )
    text.add_argument(
        "--reference", metavar="MODEL", help="checkpoint to compare with: KL divergence, agreement, its perplexity"
    )
    tasks = parser.add_argument_group("tasks of lm-eval instead, run by mlx-lm")
    tasks.add_argument(
        "--tasks", metavar="NAMES", help="such as arc_easy,hellaswag; needs pip install 'mlx-lm[evaluate]'"
    )
    tasks.add_argument(
        "--num-shots", type=int, metavar="N", help="examples in front of a question (default: the task's)"
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="questions of a task (default: all)")
    tasks.add_argument("--batch-size", type=int, metavar="N", help="sequences at once (default: mlx-lm's 8)")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, for programs")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status.

    Raises:
        InputError: an option is out of range, the text is too short, or the checkpoints do not belong together.
        ArceeError: a checkpoint cannot be used.
    """
    others, kind = (_TEXT_OPTIONS, "with") if args.tasks is not None else (_TASK_OPTIONS, "without")
    if given := [name for name in others if getattr(args, name) is not None]:
        raise InputError(f"--{given[0].replace('_', '-')} {kind} --tasks: it does nothing there; leave one of them out")
    return _run_tasks(args) if args.tasks is not None else _run_text(args)


def _run_text(args: argparse.Namespace) -> int:
    file = args.text or DEFAULT_TEXT
    text = read_text(file)
    folder = resolve_folder(args.model, revision=args.revision)
    opened, name = open_model(folder), args.model
    if args.adapter_path is not None:
        opened = replace(opened, adapter=read_adapter(args.adapter_path, opened.model))
        name = f"{args.model} with {args.adapter_path}"
    reference = None if args.reference is None else open_model(resolve_folder(args.reference))
    windows = _read_windows(args, opened, reference, text)
    total = count_part(opened) if reference is None else count_bytes(reference, opened)
    comparison = None
    with _show_progress(total) as on_progress:
        if reference is None:
            perplexities = {name: measure_perplexity(opened, windows, on_progress=on_progress)}
        else:
            comparison = compare(reference, opened, windows.ids, scored=windows.scored, on_progress=on_progress)
            perplexities = _read_perplexities(name, args.reference, comparison, windows)
    source = {
        "model": args.model,
        "adapter": args.adapter_path,
        "reference": args.reference,
        "text": file.name,
        "windows": windows.ids.shape[0],
        "window_tokens": windows.ids.shape[1],
    }
    if args.json:
        values = source | perplexities[name].to_dict()
        print(json.dumps(values | {"comparison": comparison and comparison.to_dict()}, allow_nan=False))
    else:
        print("\n".join(describe(source, perplexities, comparison)))
    return 0


def describe(
    source: Mapping[str, Any], perplexities: Mapping[str, Perplexity], comparison: Comparison | None
) -> Iterator[str]:
    """The lines of the table for people.

    Args:
        source: model, text, windows, window_tokens.
        perplexities: of the model, and of the reference if there is one, by their names.
        comparison: of the two.
    """
    measured = next(iter(perplexities.values()))
    yield (
        f"{source['text']}: {source['windows']:,} windows of {source['window_tokens']:,} tokens predict "
        f"{measured.tokens:,} tokens, {measured.text_bytes:,} bytes"
    )
    yield ""
    yield "perplexity  standard error  bits per byte"
    for name, own in perplexities.items():
        yield f"{own.perplexity:10.4f}{own.standard_error:16.4f}{own.bits_per_byte:15.4f}  {name}"
    if comparison is not None:
        yield ""
        yield (
            f"KL divergence from {source['reference']}: {comparison.kl_mean:.3e} nats a token, standard error "
            f"{comparison.kl_error:.1e}; 99 % below {comparison.kl_p99:.3e}, at most {comparison.kl_max:.3e}"
        )
        yield f"Both hold the same token for the likeliest in {comparison.top1_agreement:.2%} of the places."


def _read_windows(args: argparse.Namespace, opened: OpenedModel, reference: OpenedModel | None, text: str) -> Windows:
    tokenizer = read_tokenizer(opened.checkpoint.folder)
    if reference is not None and not read_tokenizer(reference.checkpoint.folder).shares_vocabulary(tokenizer):
        raise InputError(
            f"--reference {args.reference}: its tokenizer has another vocabulary than {args.model}; expected the same; "
            f"compare a checkpoint with the one it was made from"
        )
    most = min(each.config.max_position_embeddings for each in (opened, reference) if each is not None)
    length = min(_WINDOW_TOKENS, most) if args.sequence_length is None else args.sequence_length
    if length > most:
        raise InputError(f"--sequence-length is {length}; expected at most {most}, the model's positions; take fewer")
    count = _WINDOWS if args.num_samples is None else args.num_samples
    return cut_windows(
        tokenizer,
        text,
        window_tokens=length,
        stride=args.stride,
        max_windows=None if count == -1 else count,
        vocab_size=opened.config.vocab_size,
    )


def _read_perplexities(model: str, reference: str, comparison: Comparison, windows: Windows) -> dict[str, Perplexity]:
    named = {
        model: (comparison.perplexity, comparison.perplexity_error),
        reference: (comparison.perplexity_reference, comparison.perplexity_reference_error),
    }
    found = {}
    for name, (perplexity, error) in named.items():
        if perplexity is None or error is None:
            raise InputError(f"{model} and {reference}: expected heads in both; name causal models")
        found[name] = Perplexity(
            tokens=windows.tokens, text_bytes=windows.text_bytes, perplexity=perplexity, standard_error=error
        )
    return found


@contextlib.contextmanager
def _show_progress(total_bytes: int) -> Iterator[Progress]:
    from tqdm import tqdm

    with tqdm(total=total_bytes, desc="eval", unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def advance(part: str, nbytes: int) -> None:
            bar.set_postfix_str(part, refresh=False)
            bar.update(nbytes)

        yield advance


def _run_tasks(args: argparse.Namespace) -> int:
    """mlx-lm's evaluate, whose own output goes to standard error."""
    from ..lm.command import run_command

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    if not names:
        raise InputError(f"--tasks is {args.tasks!r}; expected names with commas between, such as arc_easy,hellaswag")
    folder = resolve_folder(args.model, revision=args.revision)
    options = [(f"--{name.replace('_', '-')}", getattr(args, name)) for name in _TASK_OPTIONS]
    arguments = ["--model", str(folder), "--tasks", *names]
    arguments += [word for name, value in options if value is not None for word in (name, str(value))]
    with tempfile.TemporaryDirectory() as results:
        with contextlib.redirect_stdout(sys.stderr):
            run_command("evaluate", [*arguments, "--output-dir", results])
        written = [json.loads(path.read_text(encoding="utf-8")) for path in Path(results).iterdir()]
    if len(written) != 1:
        raise ArceeError(f"mlx-lm's evaluate wrote {len(written)} files of results; expected one; see its output above")
    if args.json:
        print(json.dumps({"model": args.model, "tasks": written[0]}))
    else:
        print("\n".join(_describe_tasks(written[0])))
    return 0


def _describe_tasks(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield "     value  standard error  task, metric"
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, _, variant = key.partition(",")
            if isinstance(value, float) and not metric.endswith("_stderr"):
                error = metrics.get(f"{metric}_stderr,{variant}")
                shown = f"{error:16.4f}" if isinstance(error, float) else f"{'-':>16}"
                name = metric if variant in ("", "none") else f"{metric} ({variant})"
                yield f"{value:10.4f}{shown}  {task}, {name}"
