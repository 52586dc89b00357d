"""measure_sparsity: which neurons a text leaves at zero after the activation, layer by layer, whatever the model's size.

Computed in float32 on every device: half precision rounds a few inputs next to zero the other way, and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.opening import OpenedModel
from ..errors import InputError
from ..model.activations import ACTIVATIONS
from ..model.config import ArceeConfig
from ..model.inputs import check_ids
from .layers import LayerStream, WeightReader, check_finite

SPARSE_ACTIVATIONS = ("relu2", "relu")
UNIONS = (2, 4, 8)  # tokens of one step, each twice the one before
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
RARE = 0.01


@dataclass(frozen=True, kw_only=True)
class LayerSparsity:
    """What a layer's neurons do on a text.

    Attributes:
        index: of the layer.
        zeros: float64 (N, T), share of the neurons that are exactly zero, for each token.
        firing_rates: float64 (F,), share of the tokens for which a neuron is not zero.
        active: tokens of a step -> mean share of the neurons that at least one of so many consecutive tokens needs;
            1, 2, 4 and 8.
    """

    index: int
    zeros: NDArray[np.float64]
    firing_rates: NDArray[np.float64]
    active: dict[int, float]

    @property
    def dead(self) -> float:
        """Share of the neurons that no token of the text needs."""
        return float((self.firing_rates == 0).mean())

    @property
    def rare(self) -> float:
        """Share of those that fewer than a hundredth of the tokens need, the dead included."""
        return float((self.firing_rates < RARE).mean())

    @property
    def always_on(self) -> float:
        """Share of those that every token needs."""
        return float((self.firing_rates == 1).mean())

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them: without the arrays, of which it has mean, range and quantiles."""
        rates = np.quantile(self.firing_rates, QUANTILES)
        return {
            "index": self.index,
            "zeros": {
                "mean": float(self.zeros.mean()), "min": float(self.zeros.min()), "max": float(self.zeros.max())
            },
            "firing_rates": {
                "dead": self.dead,
                "below_1_percent": self.rare,
                "always_on": self.always_on,
                "quantiles": {str(q): float(rate) for q, rate in zip(QUANTILES, rates, strict=True)},
            },
            "active": {str(tokens): share for tokens, share in self.active.items()},
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class SparsityProfile:
    """What a model's neurons do on a text; from `measure_sparsity`.

    Attributes:
        activation: "relu2" or "relu".
        neurons: of a layer.
        windows, window_tokens: of the text, each read from position 0.
        layers: in their order.
    """

    activation: str
    neurons: int
    windows: int
    window_tokens: int
    layers: Sequence[LayerSparsity]

    @property
    def zeros(self) -> float:
        """Share of zeros over all layers and tokens."""
        return float(np.mean([layer.zeros.mean() for layer in self.layers]))

    def active(self, tokens: int) -> list[float]:
        """Of each layer, the share of the neurons that a step of 1, 2, 4 or 8 tokens needs."""
        return [layer.active[tokens] for layer in self.layers]

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them."""
        return {
            "activation": self.activation,
            "neurons": self.neurons,
            "windows": self.windows,
            "window_tokens": self.window_tokens,
            "zeros": self.zeros,
            "layers": [layer.to_dict() for layer in self.layers],
        }


def measure_sparsity(
    opened: OpenedModel, ids: mx.array, *, on_layer: Callable[[int], object] | None = None
) -> SparsityProfile:
    """Runs a text through a model with one layer in memory, and counts the neurons that are not zero.

    Args:
        opened: a checkpoint, float or quantized, in any layout.
        ids: int (N, T), windows of a text, from `read_windows`; T at least 8.
        on_layer: told the index of each layer that is done.

    Raises:
        InputError: the activation gives no exact zeros, the windows are too short, or the ids do not fit the model.
        CheckpointError: a file cannot be read.
        ArceeError: the model gives Inf or NaN; names the layer.
    """
    config = opened.config
    _check_activation(config)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < UNIONS[-1]:
        raise InputError(
            f"ids have shape {ids.shape}; expected (windows, tokens), {UNIONS[-1]} tokens at least; take longer windows"
        )
    check_ids(ids, 0, config.vocab_size, "ids")
    entries = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
    stream = LayerStream(config, WeightReader(entries, config.quantization))
    h = stream.embed(ids)
    layers = []
    for index in range(config.num_hidden_layers):
        with stream.layer(index) as layer:
            counter = _Counter(ACTIVATIONS[config.hidden_act])
            layer.mlp.act_fn = counter
            h = stream.run(layer, h)
        check_finite(h, f"{config.source}: layer {index}")
        layers.append(counter.summarize(index))
        if on_layer is not None:
            on_layer(index)
    return SparsityProfile(
        activation=config.hidden_act,
        neurons=config.intermediate_size,
        windows=ids.shape[0],
        window_tokens=ids.shape[1],
        layers=layers,
    )


def _check_activation(config: ArceeConfig) -> None:
    """Raises InputError for a model whose neurons are not exactly zero when their input is negative."""
    if config.hidden_act not in SPARSE_ACTIVATIONS:
        raise InputError(
            f"{config.source}: hidden_act is {config.hidden_act!r}; expected {' or '.join(map(repr, SPARSE_ACTIVATIONS))}, "
            f"which give exact zeros; there is nothing to leave out in this model, so run it as it is"
        )


class _Counter:
    """Stands in for a layer's activation function, and counts what it gives."""

    def __init__(self, activation: Callable[[mx.array], mx.array]) -> None:
        self._activation = activation
        self._firing = np.zeros(())
        self._needed: dict[int, list[NDArray[Any]]] = {tokens: [] for tokens in (1, *UNIONS)}

    def __call__(self, x: mx.array) -> mx.array:
        """(n, T, F), whole windows."""
        values = self._activation(x)
        active = values != 0
        self._firing = self._firing + np.array(active.sum(axis=(0, 1)))
        self._neurons = x.shape[-1]
        self._needed[1].append(np.array(active.sum(axis=-1)))
        for tokens in UNIONS:
            even = active.shape[1] // 2 * 2
            active = active[:, 0:even:2] | active[:, 1:even:2]
            self._needed[tokens].append(np.array(active.sum(axis=-1)))
        return values

    def summarize(self, index: int) -> LayerSparsity:
        needed = {tokens: np.concatenate(counts) / self._neurons for tokens, counts in self._needed.items()}
        return LayerSparsity(
            index=index,
            zeros=1 - needed[1],
            firing_rates=self._firing / needed[1].size,
            active={tokens: float(shares.mean()) for tokens, shares in needed.items()},
        )
