"""The tensors of a checkpoint by their headers: how many, how stored, and where they differ from what config says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..checkpoint.files import (
    FLOATS,
    Checkpoint,
    TensorEntry,
    read_header,
    read_table,
)
from ..checkpoint.hub import Listing
from ..checkpoint.names import choose_class, layout_of, strip_prefix
from ..checkpoint.opening import OpenedModel, find_misfits, lay_out_model
from ..checkpoint.quantization import MODES, find_entry
from ..checkpoint.shards import INDEX_FILE, WEIGHTS_FILE, explain_no_weights, find_disagreements, read_weight_map
from ..errors import CheckpointError
from ..model.config import ArceeConfig, read_json
from ..model.decoder import ArceeForCausalLM, ArceeModel
from .results import Amount, Finding, Weights
from .settings import explain_refusal

_PARTS = {
    "embed_tokens": "embedding",
    "self_attn": "attention",
    "mlp": "mlp",
    "lm_head": "head",
    "score": "head",
    "qa_outputs": "head",
}
_MATRICES = ("weight", "weight_by_neuron")
_LISTED = 5  # mis-shaped tensors by name
_STALE = "rotary_emb.inv_freq"
_DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Headers:
    """The headers of a checkpoint's weight files.

    Attributes:
        files: names of those that belong to the checkpoint and could be read.
        checkpoint: the tensors in them.
        unread: names of tensors that the index places in a file that could not be read.
        is_whole: False if a file could not be read whose tensors nobody names.
    """

    files: tuple[str, ...]
    checkpoint: Checkpoint
    unread: frozenset[str]
    is_whole: bool


def read_headers(listing: Listing) -> tuple[Headers, list[Finding]]:
    """Reads the headers of all weight files, from the folder or from the hub, and goes on where one cannot be read.

    Raises:
        HubError: the hub refused, or could not be reached.
    """
    folder, findings = listing.folder, []
    weight_map: dict[str, str] = {}
    try:
        if WEIGHTS_FILE in listing.size_bytes:
            names = [WEIGHTS_FILE]
        elif INDEX_FILE in listing.size_bytes:
            weight_map = read_weight_map(folder)
            names = list(dict.fromkeys(weight_map.values()))
        else:
            raise CheckpointError(explain_no_weights(folder, listing.size_bytes))
    except CheckpointError as error:
        return Headers((), Checkpoint(folder, {}), frozenset(), False), [Finding("error", "weights", str(error))]
    headers: dict[str, dict[str, TensorEntry]] = {}
    for name in names:
        try:
            headers[name] = _read_header(listing, name)
        except CheckpointError as error:
            findings.append(Finding("error", "weights", str(error)))
    if weight_map:
        findings += [Finding("error", "weights", text) for text in find_disagreements(folder, weight_map, headers)]
    entries = {tensor: entry for header in headers.values() for tensor, entry in header.items()}
    unread = frozenset(tensor for tensor, name in weight_map.items() if name not in headers)
    is_whole = bool(weight_map) or len(headers) == len(names)
    return Headers(tuple(headers), Checkpoint(folder, entries), unread, is_whole), findings


def _read_header(listing: Listing, name: str) -> dict[str, TensorEntry]:
    path = listing.folder / name
    if name not in listing.size_bytes or listing.repo_id is None or path.exists():
        return read_header(path)
    table, size = listing.fetch_header(name), listing.size_bytes[name]
    data_bytes = max((info["data_offsets"][1] for info in table.values()), default=0)
    if data_bytes + 8 > size:
        raise CheckpointError(f"{path}: is {size} bytes; expected {data_bytes} of tensors; give another revision")
    return read_table(path, table, size - data_bytes, size)


def measure_weights(headers: Headers, quantization: Mapping[str, Any]) -> Weights | None:
    """Adds up what is stored: by part of the decoder, and by form.

    Args:
        headers: of the weight files.
        quantization: MLX's table from config.json, {} without one.
    """
    entries = {name: entry for name, entry in headers.checkpoint.entries.items() if not name.endswith(_STALE)}
    if not entries:
        return None
    parts: dict[str, Amount] = {}
    forms: dict[str, Amount] = {}
    part_forms: dict[str, set[str]] = {}
    for name, entry in entries.items():
        layer, _, kind = name.rpartition(".")
        scales = entries.get(f"{layer}.scales")
        form, parameters = entry.dtype, math.prod(entry.shape)
        if scales is not None and kind in (*_MATRICES, "scales", "biases"):
            form, inputs = _quantized_form(entries, layer, quantization)
            parameters = scales.shape[0] * inputs if kind in _MATRICES and scales.shape else 0
        amount = Amount(tensors=1, parameters=parameters, size_bytes=entry.nbytes)
        part = _part_of(name)
        parts[part] = _add([parts[part], amount]) if part in parts else amount
        forms[form] = _add([forms[form], amount]) if form in forms else amount
        part_forms.setdefault(part, set()).add(form)
    order = ("embedding", "attention", "mlp", "norms", "head", "other")
    return Weights(
        total=_add(parts.values()),
        parts={name: parts[name] for name in order if name in parts},
        forms=dict(sorted(forms.items(), key=lambda item: -item[1].size_bytes)),
        part_forms={name: tuple(sorted(part_forms[name])) for name in order if name in parts},
        dtypes=dict(Counter(entry.dtype for entry in entries.values()).most_common()),
        files=headers.files,
    )


def _add(amounts: Iterable[Amount]) -> Amount:
    summed = list(amounts)
    return Amount(
        tensors=sum(a.tensors for a in summed),
        parameters=sum(a.parameters for a in summed),
        size_bytes=sum(a.size_bytes for a in summed),
    )


def _part_of(name: str) -> str:
    pieces = name.split(".")
    part = next((_PARTS[piece] for piece in pieces if piece in _PARTS), None)
    return part or ("norms" if any(piece.endswith("norm") for piece in pieces) else "other")


def _quantized_form(entries: Mapping[str, TensorEntry], layer: str, quantization: Mapping[str, Any]) -> tuple[str, int]:
    """How a quantized layer is stored, in words, and the length of its rows: the file says bits, config.json the group size."""
    table = find_entry(quantization, layer) or quantization
    group_size, mode = table.get("group_size"), table.get("mode", "affine")
    if group_size is None and mode in tuple(MODES):  # as mlx-lm's mixed recipes write it: the mode's own
        group_size = MODES[mode][1][0]
    scales = entries[f"{layer}.scales"]
    weight = next((entries[f"{layer}.{name}"] for name in _MATRICES if f"{layer}.{name}" in entries), None)
    if not isinstance(group_size, int) or weight is None or not weight.shape or not scales.shape or not scales.nbytes:
        return "quantized", math.prod(weight.shape[1:]) if weight is not None else 0
    inputs = scales.shape[-1] * group_size
    bits = weight.shape[-1] * 32 / max(inputs, 1)
    return f"{bits:g} bits in groups of {group_size}" + ("" if mode == "affine" else f", {mode}"), inputs


def compare(config: ArceeConfig, headers: Headers, listing: Listing) -> list[Finding]:
    """Lists what `load_model` would refuse, all of it, and what it passes over or changes."""
    checkpoint = headers.checkpoint
    findings: list[Finding] = []
    heads = {
        name.split(".")[0] == "lm_head" for name in checkpoint.entries if "embed_tokens." in name or "lm_head." in name
    }
    is_split = config.tie_word_embeddings and heads == {True, False}
    has_values = all(entry.file.exists() for entry in checkpoint.entries.values())
    laid_out = replace(config, tie_word_embeddings=False) if is_split and not has_values else config
    try:
        model_class = choose_class(config)
    except Exception as error:
        findings.append(Finding("error", "config", explain_refusal(error, config.source)))
        model_class = ArceeModel
    try:
        opened = lay_out_model(laid_out, checkpoint, model_class)
    except Exception as error:
        return [*findings, Finding("error", "weights", explain_refusal(error, config.source))]
    findings += _explain_misfits(opened, headers)
    if isinstance(opened.model, ArceeForCausalLM) and config.tie_word_embeddings:
        findings += _explain_tie(opened, heads, has_values=has_values)
    return findings + _explain_dtypes(config, opened) + _explain_table(config, opened, listing)


def _explain_tie(opened: OpenedModel, heads: set[bool], *, has_values: bool) -> list[Finding]:
    """What a tie of head and embedding comes to, by which of them are stored: {True} is the head, {False} the other."""
    if heads == {True}:
        return [Finding("note", "weights", "tied, and stored as lm_head: the embedding is taken from it")]
    if heads != {True, False}:
        return []
    if not has_values:
        text = "tied, yet embedding and head are both there; whether they are equal shows after the download"
        return [Finding("note", "weights", text)]
    if "lm_head" not in opened.model:
        return [Finding("note", "weights", "tied, and stored twice: the head's copy is not used")]
    text = "config.json ties head and embedding, but the files hold two that differ: both are used, as in transformers"
    return [Finding("warning", "weights", text)]


def _explain_misfits(opened: OpenedModel, headers: Headers) -> list[Finding]:
    misfits, head = find_misfits(opened), layout_of(type(opened.model)).head
    # What lies in a file that could not be read is not missing besides, and its layers may be quantized.
    unread = {strip_prefix(name) for name in headers.unread}
    half = {name.removesuffix(".scales") for name in unread}
    wrong = {n: text for n, text in misfits.wrong.items() if strip_prefix(n).rpartition(".")[0] not in half}
    texts = [f"{name} {problem}" for name, problem in list(wrong.items())[:_LISTED]]
    if len(wrong) > _LISTED:
        texts.append(f"{len(wrong) - _LISTED} more tensors that do not fit config.json")
    if misfits.unexpected:
        names = _few([entry.name for entry in misfits.unexpected])
        texts.append(f"not a part of the model that config.json describes: {names}")
    missing = [key for key in misfits.missing if strip_prefix(key) not in unread]
    if headers.is_whole and missing:
        advice = "; the head cannot be made up" if any(key.split(".")[0] == head for key in missing) else ""
        texts.append(f"missing: {_few([f'{key} {misfits.missing[key]}' for key in missing])}{advice}")
    return [Finding("error", "weights", text) for text in texts]


def _explain_dtypes(config: ArceeConfig, opened: OpenedModel) -> list[Finding]:
    entries = [opened.checkpoint.entries[name] for name in opened.names.values()]
    stored = Counter(_DTYPE_WORDS[entry.dtype] for entry in entries if entry.dtype in FLOATS)
    findings = []
    if len(stored) > 1:
        counts = ", ".join(f"{count} {dtype}" for dtype, count in stored.most_common())
        findings.append(Finding("note", "weights", f"floats of several dtypes: {counts} tensors"))
    if config.dtype is not None and stored and config.dtype not in stored:
        text = f"config.json says {config.dtype}, the files hold {', '.join(stored)}: computed in the former on a GPU"
        findings.append(Finding("warning", "weights", text))
    return findings


def _explain_table(config: ArceeConfig, opened: OpenedModel, listing: Listing) -> list[Finding]:
    """The index and the quantization table, and tensors that are passed over by name."""
    findings = []
    table = config.quantization if isinstance(config.quantization, Mapping) else {}
    quantized = {key.removesuffix(".scales") for key in opened.names if key.endswith(".scales")}
    layers = {key for key, value in table.items() if isinstance(value, Mapping)}
    if table and not quantized:
        text = "config.json has a quantization table, but no tensor is quantized: loaded as floats"
        findings.append(Finding("warning", "weights", text))
    elif lost := sorted(layers - quantized - {strip_prefix(key) for key in quantized}):
        text = f"the quantization table of config.json names layers that are not quantized: {_few(lost)}"
        findings.append(Finding("warning", "weights", text))
    names = opened.checkpoint.entries
    if stale := [name for name in names if name.endswith(_STALE)]:
        text = f"{len(stale)} stale {_STALE} of an old transformers: not used, computed from config.json instead"
        findings.append(Finding("note", "weights", text))
    if isinstance(opened.model, ArceeModel) and (heads := sorted(names.keys() - opened.names.values() - set(stale))):
        findings.append(Finding("note", "weights", f"a head that the decoder alone does not use: {_few(heads)}"))
    if WEIGHTS_FILE not in listing.size_bytes:
        metadata = read_json(listing.folder / INDEX_FILE).get("metadata")
        claimed = metadata.get("total_size") if isinstance(metadata, dict) else None
        total = sum(entry.nbytes for entry in names.values())
        if isinstance(claimed, int) and claimed != total:
            text = f"{INDEX_FILE} says {claimed:,} bytes of tensors; the files hold {total:,}"
            findings.append(Finding("note", "weights", text))
    return findings


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
