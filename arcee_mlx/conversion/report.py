"""What a conversion says of itself: conversion.json for programs, and a summary for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..checkpoint.files import write_json
from .plan import PlannedTensor
from .result import Conversion, describe_bytes, peak_memory_bytes

REPORT_FILE = "conversion.json"
_FORMAT = 1  # of conversion.json


def write_report(
    folder: Path,
    conversion: Conversion,
    plan: Sequence[PlannedTensor],
    *,
    source_files: Mapping[str, str],
    result_files: Mapping[str, str],
) -> None:
    """Writes conversion.json: all that can be said of a conversion, and nothing of the machine but its memory and time.

    Args:
        folder: where to.
        conversion: the result.
        plan: what was written.
        source_files, result_files: file name -> SHA-256.
    """
    forms: dict[str, dict[str, Any]] = {}
    for tensor in plan:
        own = forms.setdefault(tensor.form, {"form": tensor.form, "tensors": 0, "weights": 0, "bytes": 0})
        own["tensors"] += 1
        own["weights"] += tensor.weights
        own["bytes"] += tensor.nbytes
    values = {key: value for key, value in conversion.to_dict().items() if key != "folder"}
    files = {"source_files": dict(source_files), "result_files": dict(result_files)}
    write_json(folder / REPORT_FILE, {"format": _FORMAT} | values | {"forms": list(forms.values())} | files)


def summarize(conversion: Conversion) -> str:
    """A few lines for a person to read, after the conversion."""
    lines = [
        f"source  {conversion.source}, {describe_bytes(conversion.source_bytes)}",
        f"output  {conversion.folder}, {describe_bytes(conversion.bytes)}",
        f"form    {conversion.form}; {conversion.bits_per_weight:.3f} bits per weight",
        f"effort  {conversion.seconds:.1f} s, {describe_bytes(peak_memory_bytes())} peak memory",
    ]
    if conversion.scaled_neurons:
        lines.append(f"scaled  {conversion.scaled_neurons:,} neurons, which their down projections take back")
    lines += _describe_quality(conversion)
    if conversion.float_layers:
        first, more = conversion.float_layers[0], len(conversion.float_layers) - 1
        lines.append(
            f"note    rows of {first}{f' and {more} more' if more else ''} do not divide into groups: kept as floats"
        )
    if "tokenizer.json" not in conversion.carried_files:
        lines.append("note    the source has no tokenizer.json: add one before generating text")
    if (conversion.comparison or any(conversion.errors.values())) and find_spec("matplotlib") is None:
        lines.append("note    no picture of the errors was drawn: pip install 'arcee-mlx[plot]'")
    return "\n".join(lines)


def _describe_quality(conversion: Conversion) -> list[str]:
    lines, comparison = [], conversion.comparison
    errors = [error for error in conversion.errors.values() if error]
    if errors and conversion.calibration is None:
        lines.append(f"checked {len(conversion.errors)} tensors; weights off by {min(errors):.2%} to {max(errors):.2%}")
    elif conversion.errors:
        lines.append(f"checked {len(conversion.errors)} tensors")
    if comparison is None:
        return lines
    if comparison.kl_mean is None:
        lines.append(
            f"quality hidden states off by {comparison.hidden_error:.2%} ({comparison.tokens:,} tokens, no head)"
        )
    else:
        lines.append(
            f"quality KL {comparison.kl_mean:.2e} nats a token, 99 % below {comparison.kl_p99:.2e}; perplexity "
            f"{comparison.perplexity_reference:.3f} -> {comparison.perplexity:.3f}; same likeliest token "
            f"{comparison.top1_agreement:.2%} ({comparison.tokens:,} tokens)"
        )
    worst = ", ".join(f"{layer.index} ({layer.own:.2%})" for layer in comparison.worst_layers())
    return [*lines, f"worst   layers {worst}: error of what each adds"]
