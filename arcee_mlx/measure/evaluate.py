"""compare: how close one checkpoint stays to another, on a text and layer by layer, whatever their size.

In memory are one layer, the text's hidden states, and a slice of the head. Both are computed in float32, so that only
their weights differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.names import strip_prefix
from ..checkpoint.opening import OpenedModel
from ..errors import InputError
from ..model.decoder import DecoderLayer
from ..model.inputs import check_ids
from .divergence import FinalStates, Predictions, compare_predictions
from .layers import LayerStream, WeightReader, check_finite

_SEQUENCES_TOGETHER = 4
_TINY = 1e-30  # in place of the length of nothing

Progress = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How far a layer's output is from the reference's.

    Attributes:
        index: of the layer.
        own: of this layer alone: the distance of the outputs for the reference's input, relative to the length of what
            the reference's layer adds to that input.
        accumulated: of all layers so far: the distance of the two streams after it, relative to the reference's length.
    """

    index: int
    own: float
    accumulated: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How a checkpoint predicts a text, measured by a reference; from `compare`.

    What is about predictions is None where one of the two is a decoder without a head.

    Attributes:
        tokens: that were predicted: all but the first of each window.
        perplexity_reference, perplexity: of the reference and of the other.
        kl_mean, kl_p99, kl_max: KL(reference || other) of a token's prediction, in nats: mean, 99th percentile, most.
        top1_agreement: share of the tokens for which both hold the same one for the likeliest.
        hidden_error: distance of the final hidden states that predict them, relative to the reference's length.
        layers: errors of each.
    """

    tokens: int
    perplexity_reference: float | None
    perplexity: float | None
    kl_mean: float | None
    kl_p99: float | None
    kl_max: float | None
    top1_agreement: float | None
    hidden_error: float
    layers: Sequence[LayerError]

    def worst_layers(self, count: int = 3) -> list[LayerError]:
        """The layers that change most by themselves, the worst first."""
        return sorted(self.layers, key=lambda layer: -layer.own)[:count]

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them."""
        return asdict(self)


def count_bytes(reference: OpenedModel, other: OpenedModel) -> int:
    """What `compare` tells `on_progress` in all."""
    return sum(_count(opened) for opened in (reference, other))


def compare(
    reference: OpenedModel, other: OpenedModel, ids: mx.array, *, on_progress: Progress | None = None
) -> Comparison:
    """Compares a checkpoint with the one it was made from.

    Args:
        reference: what the other is measured by.
        other: of the same sizes, in any form and layout.
        ids: int (N, T), windows of a text, from `read_windows`; T at least 2.
        on_progress: told the name of each part that is done, and the bytes it has in both checkpoints.

    Raises:
        InputError: the models have different sizes, or the ids do not fit them.
        CheckpointError: a file cannot be read.
        ArceeError: a model gives Inf or NaN; names the layer.
    """
    _check_sizes(reference, other)
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(f"ids have shape {ids.shape}; expected (windows, tokens), 2 tokens at least; take more text")
    check_ids(ids, 0, reference.config.vocab_size, "ids")
    report = on_progress or (lambda part, nbytes: None)
    expected, found = _Run(reference, ids), _Run(other, ids)
    layers, layer_bytes = [], 0
    for index in range(reference.config.num_hidden_layers):
        layers.append(_compare_layer(index, expected, found))
        done = sum(_count(opened, f"layers.{index}.") for opened in (reference, other))
        report(f"layers.{index}", done)
        layer_bytes += done
    expected_end, found_end = expected.finish(), found.finish()
    hidden_error = _RelativeError()
    hidden_error.add(found_end.states - expected_end.states, expected_end.states)
    predictions = None
    if expected.stream.has_head and found.stream.has_head:
        predictions = compare_predictions(expected_end, found_end, ids[:, 1:].reshape(-1))
    report("lm_head", count_bytes(reference, other) - layer_bytes)
    return _summarize(predictions, layers, hidden_error.value, ids.shape[0] * (ids.shape[1] - 1))


class _Run:
    """A checkpoint and the text's hidden states in it, (up to 4, T, E) each, as far as it has been run."""

    def __init__(self, opened: OpenedModel, ids: mx.array) -> None:
        entries = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
        self.stream = LayerStream(opened.config, WeightReader(entries, opened.config.quantization))
        self.name = opened.checkpoint.folder.name
        starts = range(0, ids.shape[0], _SEQUENCES_TOGETHER)
        self.states = [self.stream.embed(ids[start : start + _SEQUENCES_TOGETHER]) for start in starts]
        for h in self.states:
            check_finite(h, f"{self.name}: the embedding")

    def run(self, layer: DecoderLayer, index: int, h: mx.array) -> mx.array:
        out = self.stream.run(layer, h)
        check_finite(out, f"{self.name}: layer {index}")
        return out

    def finish(self) -> FinalStates:
        """Normed states of all tokens that have a next one."""
        states = mx.concatenate([self.stream.norm(h)[:, :-1].reshape(-1, h.shape[-1]) for h in self.states])
        self.states.clear()
        check_finite(states, f"{self.name}: the final norm")
        return FinalStates(self.stream, states, self.name)


class _RelativeError:
    """The length of differences relative to that of what they are differences from, added up in float64."""

    def __init__(self) -> None:
        self._squares = np.zeros(2)

    def add(self, difference: mx.array, reference: mx.array) -> None:
        self._squares += [
            float(np.array(mx.square(x).sum(axis=-1)).sum(dtype=np.float64)) for x in (difference, reference)
        ]

    @property
    def value(self) -> float:
        difference, reference = self._squares
        return math.sqrt(difference / max(reference, _TINY))


def _compare_layer(index: int, expected: _Run, found: _Run) -> LayerError:
    """Runs both through a layer, whose weights are in memory one after the other."""
    own, accumulated = _RelativeError(), _RelativeError()
    inputs = expected.states
    with expected.stream.layer(index) as layer:
        expected.states = [expected.run(layer, index, h) for h in inputs]
    with found.stream.layer(index) as layer:
        for i, (x, y) in enumerate(zip(inputs, expected.states, strict=True)):
            own.add(found.run(layer, index, x) - y, y - x)
            found.states[i] = found.run(layer, index, found.states[i])
            accumulated.add(found.states[i] - y, y)
    return LayerError(index=index, own=own.value, accumulated=accumulated.value)


def _summarize(
    predictions: Predictions | None, layers: Sequence[LayerError], hidden_error: float, tokens: int
) -> Comparison:
    if predictions is None:
        nothing = dict.fromkeys(("perplexity_reference", "perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement"))
        return Comparison(tokens=tokens, hidden_error=hidden_error, layers=layers, **nothing)
    divergence = predictions.divergence
    return Comparison(
        tokens=tokens,
        perplexity_reference=_perplexity(predictions.reference_loss),
        perplexity=_perplexity(predictions.loss),
        kl_mean=float(divergence.mean()),
        kl_p99=float(np.quantile(divergence, 0.99)),
        kl_max=float(divergence.max()),
        top1_agreement=float(predictions.agrees.mean()),
        hidden_error=hidden_error,
        layers=layers,
    )


def _perplexity(losses: NDArray[Any]) -> float:
    return math.exp(min(float(losses.mean()), 700.0))  # more is no float any longer, and no use


def _count(opened: OpenedModel, part: str = "") -> int:
    """Bytes of the tensors whose path begins so; of all."""
    names = opened.names.items()
    return sum(opened.checkpoint.entries[name].nbytes for key, name in names if strip_prefix(key).startswith(part))


def _check_sizes(reference: OpenedModel, other: OpenedModel) -> None:
    for size in ("num_hidden_layers", "hidden_size", "vocab_size"):
        expected, got = (getattr(opened.config, size) for opened in (reference, other))
        if expected != got:
            raise InputError(
                f"{other.config.source}: {size} is {got}; expected {expected}, as in {reference.config.source}; compare a "
                f"checkpoint with the one it was made from"
            )
