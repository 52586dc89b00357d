"""The tokenizer, the chat template and the defaults of generation: do they fit the model, and will an answer end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.chat_template import read_chat_templates
from ..checkpoint.hub import Listing
from ..checkpoint.tokenizer import Tokenizer, read_tokenizer
from ..errors import ArceeError, InputError
from ..generate.options import GenerateOptions
from ..model.config import ArceeConfig, read_json
from .results import Finding, Level, TokenizerFacts

_ANSWER = "A short answer 7F3A."
_SAMPLING = ("max_tokens", "temp", "top_k", "top_p", "min_p", "repetition_penalty")


def read_text_side(
    listing: Listing, config: ArceeConfig | None, *, is_needed: bool
) -> tuple[TokenizerFacts | None, dict[str, Any], list[Finding]]:
    """Reads tokenizer, template and generation_config.json.

    Args:
        listing: of the checkpoint.
        config: None where it cannot be run.
        is_needed: whether a model is loaded together with its tokenizer.

    Returns:
        the tokenizer's facts, the defaults of generation, what was found.
    """
    try:
        tokenizer = read_tokenizer(listing.folder)
    except ArceeError as error:
        level: Level = "error" if is_needed else "warning"
        return None, {}, [Finding(level, "tokenizer", str(error))]
    facts = TokenizerFacts(
        kind=tokenizer.kind,
        vocab_size=tokenizer.vocab_size,
        special_tokens={name: (text, tokenizer.token_id(text)) for name, text in tokenizer.special_tokens.items()},
        eos_tokens={i: _text_of(tokenizer, i) for i in sorted(tokenizer.eos_token_ids)},
        chat_templates=_template_names(listing.folder),
    )
    findings = [*_explain_template(tokenizer), *_explain_ends(tokenizer, listing)]
    if config is None:
        return facts, {}, findings
    sampling: dict[str, Any] = {}
    try:
        options = GenerateOptions().resolve(tokenizer.generation_config, config)
        sampling = {name: getattr(options, name) for name in _SAMPLING}
    except InputError as error:
        findings.append(Finding("warning", "generation", str(error)))
    return facts, sampling, [*_compare_ids(tokenizer, config), *findings]


def _compare_ids(tokenizer: Tokenizer, config: ArceeConfig) -> list[Finding]:
    findings: list[Finding] = []
    spare = config.vocab_size - tokenizer.vocab_size
    if spare < 0:
        text = (
            f"{tokenizer.vocab_size:,} ids for an embedding of {config.vocab_size:,}: the last {-spare:,} have no row"
        )
        findings.append(Finding("warning", "tokenizer", text))
    elif spare:
        text = f"{tokenizer.vocab_size:,} ids; the embedding has {config.vocab_size:,} rows, {spare:,} to spare"
        findings.append(Finding("note", "tokenizer", text))
    eos = config.eos_token_id
    theirs = {
        "bos": config.bos_token_id,
        "eos": eos[0] if isinstance(eos, list) and len(eos) == 1 else eos,
        "pad": config.pad_token_id,
    }
    own = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    for name, value in theirs.items():
        ids = value if isinstance(value, list) else [value]
        if value is not None and own[name] is not None and own[name] not in ids:
            text = f"{name}_token_id is {value} in config.json, and {own[name]} by the tokenizer's {name}_token"
            findings.append(Finding("note" if name == "pad" else "warning", "tokenizer", text))
    if lost := sorted(i for i in tokenizer.eos_token_ids if i >= config.vocab_size):
        text = f"end-of-text ids {lost} are beyond the embedding's {config.vocab_size:,} rows: they never come"
        findings.append(Finding("warning", "generation", text))
    for name, text in tokenizer.special_tokens.items():
        if tokenizer.token_id(text) is None:
            findings.append(Finding("warning", "tokenizer", f"{name} {text!r} is not in the vocabulary"))
    if tokenizer.pad_token is None and config.pad_token_id is None:
        findings.append(Finding("note", "tokenizer", "no pad token: batches for training need one"))
    return findings


def _explain_ends(tokenizer: Tokenizer, listing: Listing) -> list[Finding]:
    if not tokenizer.eos_token_ids:
        text = "no end-of-text id anywhere: an answer ends at max_tokens only"
        return [Finding("warning", "generation", text)]
    if "generation_config.json" not in listing.size_bytes:
        text = (
            "no generation_config.json: end-of-text ids from config.json and tokenizer, the likeliest token each time"
        )
        return [Finding("note", "generation", text)]
    if tokenizer.generation_config.get("eos_token_id") is None:
        text = "generation_config.json names no eos_token_id: those of config.json and the tokenizer count"
        return [Finding("note", "generation", text)]
    return []


def _explain_template(tokenizer: Tokenizer) -> list[Finding]:
    if not tokenizer.has_chat_template:
        return [Finding("note", "template", "no chat template: a prompt is continued as it is")]
    if tokenizer.chat_template is None:
        return [Finding("warning", "template", "no chat template is called default: name one each time")]
    question: Mapping[str, Any] = {"role": "user", "content": "A question?"}
    try:
        tokenizer.apply_chat_template([question], add_generation_prompt=True)
        chat = tokenizer.apply_chat_template([question, {"role": "assistant", "content": _ANSWER}])
    except ArceeError as error:
        return [Finding("warning", "template", str(error))]
    if _ANSWER not in chat:
        return [Finding("warning", "template", "the default chat template leaves out what the assistant said")]
    ending = tokenizer.encode(chat.rpartition(_ANSWER)[2], add_special_tokens=False)
    marks = [i for i in ending if tokenizer.decode([i]) and not tokenizer.decode([i], skip_special_tokens=True)]
    if marks and marks[0] not in tokenizer.eos_token_ids:
        text = f"the chat template ends an answer with {tokenizer.decode(marks[:1])!r} (id {marks[0]}), which does not end generation"
        return [Finding("warning", "template", text)]
    return []


def _template_names(folder: Path) -> tuple[str, ...]:
    path = folder / "tokenizer_config.json"
    return tuple(sorted(read_chat_templates(folder, read_json(path) if path.is_file() else {})))


def _text_of(tokenizer: Tokenizer, token_id: int) -> str | None:
    try:
        return tokenizer.decode([token_id]) or None
    except InputError:  # beyond both tokenizer and model
        return None
