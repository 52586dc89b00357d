"""conversion.png: the errors of a conversion by layer, in two panels; matplotlib (extra `plot`) draws it where it is there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import sync_file
from ..measure.evaluate import Comparison

PICTURE_FILE = "conversion.png"
_LAYER = re.compile(r"layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.")


def write_picture(folder: Path, errors: Mapping[str, float], comparison: Comparison | None = None) -> Path | None:
    """Draws the errors of weights by layer, and those of outputs, or of kinds of tensors where nothing was compared.

    Args:
        folder: where to.
        errors: tensor name -> relative error, from `check_result`.
        comparison: of the result with its source.

    Returns:
        the picture's path; None where there is nothing to draw, or no matplotlib.
    """
    if comparison is None and not any(errors.values()):
        return None
    try:
        from matplotlib.figure import Figure  # no pyplot: it has a state of its own, and may want a display
    except ImportError:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_weights(left, errors)
    if comparison is None:
        _draw_kinds(right, errors)
    else:
        _draw_outputs(right, comparison)
    path = folder / PICTURE_FILE
    figure.savefig(path, dpi=130)
    with open(path, "rb") as file:
        sync_file(file.fileno())
    return path


def _draw_weights(axes: Any, errors: Mapping[str, float]) -> None:
    """A line for each kind of matrix over the layers."""
    kinds: dict[str, dict[int, float]] = {}
    for name, error in errors.items():
        if found := _LAYER.search(name):
            kinds.setdefault(found[2], {})[int(found[1])] = 100 * error
    for kind, values in sorted(kinds.items()):
        layers = sorted(values)
        axes.plot(layers, [values[layer] for layer in layers], marker="o", markersize=3, linewidth=1.2, label=kind)
    _finish(axes, "Weights: distance from the source", "layer", "% of the source's length")
    _number_layers(axes, [layer for values in kinds.values() for layer in values])
    if kinds:
        axes.legend(fontsize=8, ncols=3, loc="upper left")


def _draw_outputs(axes: Any, comparison: Comparison) -> None:
    """Each layer's own error as bars, and what has come together so far as a line."""
    layers = [layer.index for layer in comparison.layers]
    axes.bar(
        layers,
        [100 * layer.own for layer in comparison.layers],
        color="tab:blue",
        alpha=0.6,
        label="of what the layer adds",
    )
    accumulated = [100 * layer.accumulated for layer in comparison.layers]
    axes.plot(layers, accumulated, color="tab:red", marker="o", markersize=3, label="of the hidden states after it")
    title = "Outputs on a text"
    if comparison.kl_mean is not None:
        title += f" (KL {comparison.kl_mean:.2e} nats a token)"
    _finish(axes, title, "layer", "error in %")
    _number_layers(axes, layers)
    axes.legend(fontsize=8, ncols=2, loc="upper left")


def _draw_kinds(axes: Any, errors: Mapping[str, float]) -> None:
    """The mean error of each kind of matrix, embedding and head among them."""
    kinds: dict[str, list[float]] = {}
    for name, error in errors.items():
        if error:
            kind = name.split(".")[-2]
            kinds.setdefault(kind, []).append(100 * error)
    names = sorted(kinds, reverse=True)
    axes.barh(names, [sum(kinds[name]) / len(kinds[name]) for name in names], color="tab:blue", alpha=0.6)
    _finish(axes, "Weights by kind, mean over the layers", "% of the source's length", "")


def _number_layers(axes: Any, layers: list[int]) -> None:
    last = max(layers, default=0)
    axes.set_xticks(range(0, last + 1, max(1, (last + 1) // 12)))


def _finish(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if x == "layer":
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the legend above
