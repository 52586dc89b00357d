"""What a plan says of itself before anything is written: a table of all tensors, totals, memory and disk, notes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from .calibrate import MOST_FLOAT64_INPUTS
from .plan import PlannedTensor, find_idle_rules, find_undivided, quantization_table
from .prepare import ConversionPlan
from .quantize import SLICE_BYTES
from .recipes import Recipe, recipe_to_dict

# Interpreter, MLX and this package: measured, on Linux.
_BASE_BYTES = 60_000_000
_SLICES_IN_MEMORY = 4
_LAYER = re.compile(r"^(.*?layers\.)(\d+)(\..*)$")


def estimate_memory(plan: Sequence[PlannedTensor]) -> int:
    """The most memory a conversion needs, in bytes: some slices of the largest tensor, as read, cast and packed."""

    def slice_bytes(tensor: PlannedTensor) -> float:
        part = min(1.0, SLICE_BYTES / max(tensor.source.nbytes, 1))
        cast_bytes = tensor.weights * (4 if tensor.dtype == "F32" else 2)
        return part * (tensor.source.nbytes + cast_bytes + (tensor.nbytes if tensor.quantization else 0))

    return _BASE_BYTES + round(_SLICES_IN_MEMORY * max(map(slice_bytes, plan)))


def estimate_calibration_memory(plan: Sequence[PlannedTensor], tokens: int) -> int:
    """The most memory calibration needs, in bytes: a layer twice in float32, two streams of hidden states, old and new,
    and of the inputs of the widest layer the moments, one damped copy, its factor and what is computed with them.

    Args:
        plan: what will be written.
        tokens: of the calibration text.
    """
    layers: dict[str, int] = {}
    for tensor in plan:
        if found := _LAYER.match(tensor.key):
            layers[found[2]] = layers.get(found[2], 0) + tensor.weights
    matrices = [tensor for tensor in plan if tensor.quantization and _LAYER.match(tensor.key)]
    widest = max((tensor.source.shape[1] for tensor in matrices), default=0)
    hidden = min((min(tensor.source.shape) for tensor in plan if len(tensor.source.shape) == 1), default=0)
    value_bytes = 8 if widest <= MOST_FLOAT64_INPUTS else 4
    states_bytes = 4 * tokens * hidden * 4
    return _BASE_BYTES + 2 * 4 * max(layers.values(), default=0) + states_bytes + 4 * widest**2 * value_bytes


def describe_plan(planned: ConversionPlan, *, fold_layers: bool = False, calibration_tokens: int = 0) -> str:
    """A table for a person to read.

    Args:
        planned: what will be written.
        fold_layers: show runs of equal decoder layers as one.
        calibration_tokens: of the text it will be calibrated on, at most; 0 for none.
    """
    plan = planned.tensors
    rows = sorted((_Row.of(tensor) for tensor in plan), key=lambda row: _natural(row.name))
    if fold_layers:
        rows = _fold(rows)
    texts = [("tensor", "shape", "form", "MB")]
    texts += [(row.name, " x ".join(map(str, row.shape)), row.form, f"{row.nbytes / 1e6:,.3f}") for row in rows]
    widths = [max(len(text[i]) for text in texts) for i in range(4)]
    lines = [
        f"{name:<{widths[0]}}  {shape:>{widths[1]}}  {form:<{widths[2]}}  {size:>{widths[3]}}"
        for name, shape, form, size in texts
    ]
    weights, nbytes = sum(tensor.weights for tensor in plan), sum(tensor.nbytes for tensor in plan)
    lines += [
        "",
        f"total   {len(plan)} tensors, {weights / 1e6:,.1f} million weights, {nbytes / 1e6:,.2f} MB, "
        f"{_bits_per_weight(plan):.3f} bits per weight",
        f"memory  about {_estimate(plan, calibration_tokens) / 1e6:,.0f} MB needed",
        f"disk    {planned.needed_bytes / 1e6:,.2f} MB needed, {planned.free_bytes / 1e6:,.2f} MB free",
    ]
    return "\n".join(lines + [f"note    {note}" for note in find_notes(plan, planned.recipe)])


def plan_to_dict(planned: ConversionPlan, *, calibration_tokens: int = 0) -> dict[str, Any]:
    """The same as JSON holds it; sizes in bytes, shapes in weights, tensors in the order in which they are converted."""
    plan = planned.tensors
    return {
        "source": planned.conversion.source,
        "folder": str(planned.target),
        "recipe": recipe_to_dict(planned.recipe),
        "layout": planned.conversion.layout,
        "tensors": [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "form": tensor.form,
                "rule": tensor.rule,
                "source_bytes": tensor.source.nbytes,
                "bytes": tensor.nbytes,
                "outputs": {name: {"dtype": dtype, "shape": list(s)} for name, (dtype, s) in tensor.outputs.items()},
            }
            for tensor in plan
        ],
        "quantization": quantization_table(plan) or None,
        "weights": sum(tensor.weights for tensor in plan),
        "bytes": sum(tensor.nbytes for tensor in plan),
        "bits_per_weight": _bits_per_weight(plan),
        "memory_bytes": _estimate(plan, calibration_tokens),
        "disk_bytes": planned.needed_bytes,
        "free_bytes": planned.free_bytes,
        "notes": find_notes(plan, planned.recipe),
    }


def _estimate(plan: Sequence[PlannedTensor], calibration_tokens: int) -> int:
    return estimate_calibration_memory(plan, calibration_tokens) if calibration_tokens else estimate_memory(plan)


def find_notes(plan: Sequence[PlannedTensor], recipe: Recipe) -> list[str]:
    """What a user may not have meant: rules that decide nothing, and layers that cannot be quantized as asked."""
    notes = find_idle_rules(plan, recipe)
    if undivided := find_undivided(plan, recipe):
        more = f" and {len(undivided) - 1} more" if len(undivided) > 1 else ""
        notes.append(f"rows of {undivided[0]}{more} do not divide into groups: kept as floats")
    return notes


@dataclass(frozen=True)
class _Row:
    name: str
    shape: tuple[int, ...]
    form: str
    nbytes: int

    @classmethod
    def of(cls, tensor: PlannedTensor) -> _Row:
        return cls(tensor.name, tensor.shape, tensor.form, tensor.nbytes)


def _fold(rows: Sequence[_Row]) -> list[_Row]:
    """Joins successive decoder layers whose tensors are the same but for the number: "model.layers.0-7.mlp...."."""
    layers: dict[tuple[str, int], list[_Row]] = {}
    others = []
    for row in rows:
        if found := _LAYER.match(row.name):
            layers.setdefault((found[1], int(found[2])), []).append(replace(row, name=found[3]))
        else:
            others.append(row)
    folded = []
    for contents, run in groupby(layers.items(), key=lambda layer: layer[1]):
        places = [place for place, _ in run]
        prefix, first, count = *places[0], len(places)
        numbers = str(first) if count == 1 else f"{first}-{places[-1][1]}"
        folded += [replace(r, name=f"{prefix}{numbers}{r.name}", nbytes=r.nbytes * count) for r in contents]
    return sorted(others + folded, key=lambda row: _natural(row.name))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 10 after layer 9."""
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in re.split(r"(\d+)", name)]


def _bits_per_weight(plan: Sequence[PlannedTensor]) -> float:
    return 8 * sum(tensor.nbytes for tensor in plan) / max(sum(tensor.weights for tensor in plan), 1)
