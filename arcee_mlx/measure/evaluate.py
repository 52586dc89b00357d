"""compare: how close one checkpoint stays to another, on a text and layer by layer, whatever their size.

In memory are one layer, the text's hidden states, and a slice of the head. Both are computed in float32, so that only
their weights differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.opening import OpenedModel
from ..errors import InputError
from .divergence import Predictions, compare_predictions
from .perplexity import exponentiate, standard_error
from .text_run import Progress, TextRun, check_windows, count_part, cut_blocks, pick_targets, share_progress

_TINY = 1e-30  # in place of the length of nothing


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
        perplexity_reference_error, perplexity_error: standard errors of both, see `Perplexity`.
        kl_mean, kl_p99, kl_max: KL(reference || other) of a token's prediction, in nats: mean, 99th percentile, most.
        kl_error: standard error of the mean.
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
    perplexity_reference_error: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None

    def worst_layers(self, count: int = 3) -> list[LayerError]:
        """The layers that change most by themselves, the worst first."""
        return sorted(self.layers, key=lambda layer: -layer.own)[:count]

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them."""
        return asdict(self)


def count_bytes(reference: OpenedModel, other: OpenedModel) -> int:
    """What `compare` tells `on_progress` in all."""
    return sum(count_part(opened) for opened in (reference, other))


def compare(
    reference: OpenedModel,
    other: OpenedModel,
    ids: mx.array,
    *,
    scored: NDArray[np.bool_] | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """Compares a checkpoint with the one it was made from.

    Args:
        reference: what the other is measured by.
        other: of the same sizes, in any form and layout.
        ids: int (N, T), windows of a text, from `read_windows` or `cut_windows`; T at least 2.
        scored: bool (N, T), the tokens to predict, never the first of a window; None for all others.
        on_progress: told the name of each part that is done, and the bytes it has in both checkpoints; of a text that is
            read in several blocks, the block's share of them.

    Raises:
        InputError: the models have different sizes, or the ids do not fit them.
        CheckpointError: a file cannot be read.
        ArceeError: a model gives Inf or NaN; names the layer.
    """
    _check_sizes(reference, other)
    scored = check_windows(ids, scored, reference.config.vocab_size)
    layers = range(reference.config.num_hidden_layers)
    own, accumulated = ([_RelativeError() for _ in layers] for _ in range(2))
    hidden = _RelativeError()
    sizes = [sum(count_part(opened, f"layers.{index}.") for opened in (reference, other)) for index in layers]
    rest = count_bytes(reference, other) - sum(sizes)
    predictions = []
    for block in cut_blocks(ids, reference.config.hidden_size):
        report = share_progress(on_progress, block, ids.shape[0])
        expected, found = TextRun(reference, ids[block]), TextRun(other, ids[block])
        for index in layers:
            _compare_layer(index, expected, found, own[index], accumulated[index])
            report(f"layers.{index}", sizes[index])
        ends = expected.finish(scored[block]), found.finish(scored[block])
        hidden.add(ends[1].states - ends[0].states, ends[0].states)
        if expected.stream.has_head and found.stream.has_head:
            predictions.append(compare_predictions(*ends, pick_targets(ids[block], scored[block])))
        report("lm_head", rest)
    errors = [LayerError(index=i, own=own[i].value, accumulated=accumulated[i].value) for i in layers]
    return _summarize(predictions, errors, hidden.value, int(scored[:, 1:].sum()))


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


def _compare_layer(
    index: int, expected: TextRun, found: TextRun, own: _RelativeError, accumulated: _RelativeError
) -> None:
    """Runs both through a layer, whose weights are in memory one after the other."""
    inputs = expected.states
    with expected.stream.layer(index) as layer:
        expected.states = [expected.run(layer, index, h) for h in inputs]
    with found.stream.layer(index) as layer:
        for i, (x, y) in enumerate(zip(inputs, expected.states, strict=True)):
            own.add(found.run(layer, index, x) - y, y - x)
            found.states[i] = found.run(layer, index, found.states[i])
            accumulated.add(found.states[i] - y, y)


def _summarize(
    predictions: Sequence[Predictions], layers: Sequence[LayerError], hidden_error: float, tokens: int
) -> Comparison:
    if not predictions:
        nothing = dict.fromkeys(("perplexity_reference", "perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement"))
        return Comparison(tokens=tokens, hidden_error=hidden_error, layers=layers, **nothing)
    divergence, reference_loss, loss, agrees = (
        np.concatenate([getattr(part, name) for part in predictions])
        for name in ("divergence", "reference_loss", "loss", "agrees")
    )
    perplexity_reference, perplexity_reference_error = exponentiate(reference_loss)
    perplexity, perplexity_error = exponentiate(loss)
    return Comparison(
        tokens=tokens,
        perplexity_reference=perplexity_reference,
        perplexity_reference_error=perplexity_reference_error,
        perplexity=perplexity,
        perplexity_error=perplexity_error,
        kl_mean=float(divergence.mean()),
        kl_error=standard_error(divergence),
        kl_p99=float(np.quantile(divergence, 0.99)),
        kl_max=float(divergence.max()),
        top1_agreement=float(agrees.mean()),
        hidden_error=hidden_error,
        layers=layers,
    )


def _check_sizes(reference: OpenedModel, other: OpenedModel) -> None:
    for size in ("num_hidden_layers", "hidden_size", "vocab_size"):
        expected, got = (getattr(opened.config, size) for opened in (reference, other))
        if expected != got:
            raise InputError(
                f"{other.config.source}: {size} is {got}; expected {expected}, as in {reference.config.source}; compare a "
                f"checkpoint with the one it was made from"
            )
