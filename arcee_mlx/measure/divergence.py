"""How the predictions of two models differ: KL, losses and agreement, with the heads read in slices of the vocabulary.

Each slice gives a few sums a token, relative to its own largest logit; they are put together in float64 at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .layers import LayerStream, check_finite

_SLICE_ROWS, _TOKENS_TOGETHER = 4096, 512
_CLOSE = 4.0  # difference of two logits up to which the series below is the better formula
_MOST_EXPONENT = 60.0  # the exponential of it can be summed over a slice in float32

Values = NDArray[Any]


@dataclass(frozen=True)
class FinalStates:
    """Hidden states (M, E) after the final norm, the stream whose head reads them, and its name in an error."""

    stream: LayerStream
    states: mx.array
    name: str

    def logits(self, head: mx.array, tokens: slice) -> mx.array:
        """Of some tokens, for some rows of the head."""
        logits = self.states[tokens] @ head.T
        check_finite(logits, f"{self.name}: the head")
        return logits


@dataclass(frozen=True)
class Predictions:
    """How two models predict M tokens, float64 (M,) each.

    Attributes:
        divergence: KL(reference || other) in nats.
        reference_loss, loss: negative log-likelihood of the token that came, in nats, by the reference and the other.
        agrees: whether both hold the same token for the likeliest.
    """

    divergence: Values
    reference_loss: Values
    loss: Values
    agrees: Values


def compare_predictions(expected: FinalStates, found: FinalStates, targets: mx.array) -> Predictions:
    """Compares predictions over the whole vocabulary; a slice of each head is in memory.

    Args:
        expected: of the reference.
        found: of the other, for the same tokens.
        targets: int (M,), the tokens that came.

    Raises:
        ArceeError: a head gives Inf or NaN.
    """
    slices = []
    vocab_size = expected.stream.config.vocab_size
    for start in range(0, vocab_size, _SLICE_ROWS):
        stop = min(start + _SLICE_ROWS, vocab_size)
        expected_head, found_head = (own.stream.weights.rows(own.stream.head, start, stop) for own in (expected, found))
        mx.eval(expected_head, found_head)
        parts = []
        for first in range(0, targets.size, _TOKENS_TOGETHER):
            some = slice(first, first + _TOKENS_TOGETHER)
            logits = expected.logits(expected_head, some), found.logits(found_head, some)
            parts.append(measure_slice(logits[0], logits[1], targets[some], start))
        slices.append({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    return join_slices(slices)


def measure_slice(expected: mx.array, found: mx.array, targets: mx.array, start: int) -> dict[str, Values]:
    """What is kept of a slice of logits.

    Args:
        expected, found: float32 (tokens, rows of the head), finite.
        targets: int (tokens,).
        start: token id of the first of these rows.

    Returns:
        values (tokens,); for p the exponentials of `expected - top_expected`, and d = expected - found:
        mass = sum p; shift = sum p d; excess = sum p (d + exp(-d) - 1); growth = sum p (exp(-d) - 1); apart = max |d|.
    """
    values: dict[str, mx.array] = {}
    for name, logits in (("expected", expected), ("found", found)):
        place = targets - start
        inside = mx.clip(place, 0, logits.shape[1] - 1)[:, None]
        values[f"top_{name}"] = logits.max(axis=1)
        values[f"best_{name}"] = logits.argmax(axis=1) + start
        values[f"mass_{name}"] = mx.exp(logits - values[f"top_{name}"][:, None]).sum(axis=1)
        values[f"target_{name}"] = mx.where(
            (place >= 0) & (place < logits.shape[1]), mx.take_along_axis(logits, inside, axis=1)[:, 0], -mx.inf
        )
    p = mx.exp(expected - values["top_expected"][:, None])
    d = expected - found
    bounded = mx.clip(d, -_MOST_EXPONENT, _MOST_EXPONENT)
    values["shift"] = (p * d).sum(axis=1)
    values["excess"] = (p * _excess(bounded)).sum(axis=1)
    values["growth"] = (p * mx.expm1(-bounded)).sum(axis=1)
    values["apart"] = mx.abs(d).max(axis=1)
    mx.eval(values)
    return {name: np.array(value) for name, value in values.items()}


def join_slices(slices: list[dict[str, Values]]) -> Predictions:
    """Puts the slices of a vocabulary together, from `measure_slice`.

    With d = expected - found, KL = E[d] + log E[exp(-d)], the means under the reference. Of two small numbers that
    nearly cancel little would be left, so where all d are small it is E[d + exp(-d) - 1] + (log(1 + g) - g) with
    g = E[exp(-d) - 1], whose first term adds nothing but positive numbers.
    """
    values = {name: np.stack([own[name] for own in slices]).astype(np.float64) for name in slices[0]}
    log_mass, best, scale = {}, {}, {}
    for name in ("expected", "found"):
        top = values[f"top_{name}"]
        scale[name] = np.exp(top - top.max(axis=0))
        log_mass[name] = top.max(axis=0) + np.log((scale[name] * values[f"mass_{name}"]).sum(axis=0))
        best[name] = np.take_along_axis(values[f"best_{name}"], top.argmax(axis=0)[None], axis=0)[0]
    share = scale["expected"] / (scale["expected"] * values["mass_expected"]).sum(axis=0)
    shift, excess, growth = ((share * values[name]).sum(axis=0) for name in ("shift", "excess", "growth"))
    divergence = shift + log_mass["found"] - log_mass["expected"]
    close = values["apart"].max(axis=0) <= _CLOSE
    divergence[close] = (excess + np.log1p(growth, where=close, out=np.zeros_like(growth)) - growth)[close]
    return Predictions(
        divergence=np.maximum(divergence, 0.0),  # what rounding leaves of nothing may be below it
        reference_loss=log_mass["expected"] - values["target_expected"].max(axis=0),
        loss=log_mass["found"] - values["target_found"].max(axis=0),
        agrees=best["expected"] == best["found"],
    )


def _excess(d: mx.array) -> mx.array:
    """d + exp(-d) - 1, which is about d² / 2; a series near 0, where the sum would cancel."""
    series = mx.square(d) * (1 / 2 - d * (1 / 6 - d * (1 / 24 - d * (1 / 120 - d / 720))))
    return mx.where(mx.abs(d) < 0.1, series, d + mx.expm1(-d))
