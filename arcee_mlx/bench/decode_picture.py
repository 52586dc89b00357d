"""What `bench decode` measured, as a picture: how many times as fast sparse decoding is, by zeros, and what bytes allow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..measure.decode_bytes import DecodeBytes
from .decode_programs import BY_NEURON, PORT, STANDARD
from .decode_results import DecodeResult

_COLORS = {BY_NEURON: "#440154", STANDARD: "#21918c", PORT: "#e07b39"}


def draw_decode(results: Sequence[DecodeResult], decode_bytes: DecodeBytes, path: Path, *, title: str) -> None:
    """Writes the ratios as a PNG; see `check_picture` for what it needs.

    Args:
        results: one for each share of zeros.
        decode_bytes: of the model, for the curve of what the bytes allow.
        path: of the picture.
        title: over it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5.5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no state of pyplot's
    axes = figure.subplots()
    shares = np.linspace(0, 1, 201)
    layers = len(decode_bytes.down)
    allowed = [decode_bytes.step([1 - share] * layers).speedup for share in shares]
    axes.plot(shares, allowed, color="0.5", linewidth=2, linestyle="--", label="bytes allow, over dense by neuron")
    measured = sorted(results, key=lambda result: result.mean_zeros)
    zeros = [result.mean_zeros for result in measured]
    ratios = {name: [result.ratio(name) for result in measured] for name in _COLORS}
    for name, color in _COLORS.items():
        label = f"over {name}: {ratios[name][-1]:.2f} at {zeros[-1]:.0%}"
        axes.plot(zeros, ratios[name], color=color, linewidth=2, marker="o", label=label)
    axes.axhline(1, color="0.8", linewidth=1, zorder=0)
    bottom = min(1, *(ratio for each in ratios.values() for ratio in each)) - 0.1
    axes.set_title(title)
    axes.set(
        xlabel="neurons at zero",
        ylabel="times as fast, sparse",
        xlim=(max(0, min(zeros) - 0.1), 1.0),
        ylim=(bottom, None),
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(path, format="png")
