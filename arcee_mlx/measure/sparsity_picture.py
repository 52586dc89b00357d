"""A sparsity profile as a picture: zeros by layer and token, firing rates, and how many neurons several tokens need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .sparsity import UNIONS, SparsityProfile

_SIZE_INCHES, _DOTS_PER_INCH = (12, 8), 130
_COLORS = "viridis"


def check_picture(path: Path) -> None:
    """Raises InputError for a picture that could not be drawn or written, before the work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            f"{path}: a picture needs matplotlib, which is not installed; expected the extra `plot`; run "
            f"pip install 'arcee-mlx[plot]', or leave the picture out"
        ) from None
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: ends in {path.suffix or 'nothing'!r}; expected .png; name the picture so")
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"{path}: expected a file in a folder that exists; make the folder, or name another file")


def draw_picture(profile: SparsityProfile, path: Path, *, title: str) -> None:
    """Writes the profile as a PNG; see `check_picture` for what it needs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE_INCHES, dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)  # no window, no state of pyplot's
    figure.suptitle(f"{title}: {profile.zeros:.1%} of the neurons are zero for a token", fontsize=14)
    grid = figure.add_gridspec(2, 2)
    _draw_zeros(figure, figure.add_subplot(grid[0, :]), profile)
    _draw_rates(figure, figure.add_subplot(grid[1, 0]), profile)
    _draw_unions(figure.add_subplot(grid[1, 1]), profile)
    figure.savefig(path, format="png")


def _draw_zeros(figure: Any, axes: Any, profile: SparsityProfile) -> None:
    shares = np.stack([layer.zeros[0] for layer in profile.layers])
    lowest = float(np.quantile(shares, 0.01))  # or a few odd tokens would take all the colors
    image = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap=_COLORS, vmin=lowest, vmax=shares.max())
    axes.set(title="Zeros after the activation", xlabel="token of the first window", ylabel="layer")
    axes.yaxis.get_major_locator().set_params(integer=True)
    _percent(figure.colorbar(image, ax=axes, label="neurons at zero", extend="min", pad=0.01).ax.yaxis)


def _draw_rates(figure: Any, axes: Any, profile: SparsityProfile) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    last = max(len(profile.layers) - 1, 1)
    for layer in profile.layers:
        rates = np.sort(layer.firing_rates[layer.firing_rates > 0])[::-1]  # a curve ends where the dead begin
        axes.plot(np.arange(len(rates)) / profile.neurons, rates, color=colormaps[_COLORS](layer.index / last))
    axes.set(title="Firing rates", xlabel="neurons of a layer, the busiest first", ylabel="tokens that need the neuron")
    tokens = profile.windows * profile.window_tokens
    axes.set(xlim=(0, 1), yscale="log", ylim=(max(1 / tokens, 1e-3), 1))
    axes.grid(alpha=0.3)
    _percent(axes.xaxis, axes.yaxis)
    bar = figure.colorbar(ScalarMappable(Normalize(0, last), _COLORS), ax=axes, label="layer", pad=0.02)
    bar.ax.yaxis.get_major_locator().set_params(integer=True)


def _draw_unions(axes: Any, profile: SparsityProfile) -> None:
    counts = (1, *UNIONS)
    for layer in profile.layers:
        label = "each layer" if layer.index == 0 else None
        axes.plot(counts, [layer.active[n] for n in counts], color="0.75", linewidth=1, label=label)
    means = [float(np.mean(profile.active(n))) for n in counts]
    axes.plot(counts, means, color="#440154", linewidth=2.5, marker="o", label="mean")
    for count, mean in zip(counts, means, strict=True):
        label = axes.annotate(f"{mean:.0%}", (count, mean), xytext=(6, -12), textcoords="offset points", fontsize=11)
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1})
    axes.set(
        title="Neurons needed by consecutive tokens",
        xlabel="tokens read together",
        ylabel="neurons that one of them needs",
    )
    axes.set(xlim=(0.7, 9), ylim=(0, 1), xticks=counts)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    _percent(axes.yaxis)


def _percent(*axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    for axis in axes:
        axis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
