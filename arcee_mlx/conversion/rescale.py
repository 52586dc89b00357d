"""Calibrated rescaling: neurons that matter more get larger columns in a down projection whose groups they share.

In the standard layout the weights of 32 to 128 neurons share a scale. Multiplying a neuron's column by s, and its up row
by s**-0.5, changes nothing but how finely it is rounded. s = importance**power, as in AWQ (arXiv 2306.00978) with the
square root that squared ReLU asks for; the power is the one whose rounding costs least on the calibration text. On the
project's small model, rounded to nearest at 4 bits, output errors fall from 6.2 % to 5.5 % in the layer that gains most.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..checkpoint.quantization import Quantization
from .error_feedback import Floats, round_to_nearest

_POWERS = (0.0, 0.0625, 0.125, 0.1875)
_SAMPLED_ROWS = 256
# Neurons that the text hardly uses count as if they had this share of the mean: another text may use them.
_LEAST_IMPORTANCE = 1e-3


class NeuronUse:
    """What a calibration text makes of a layer's neurons: the largest input of each, and the mean square after relu²."""

    def __init__(self) -> None:
        self._maxima: mx.array | None = None
        self._squares: mx.array | None = None
        self._tokens = 0

    def add(self, inputs: mx.array, act_fn: Callable[[mx.array], mx.array]) -> None:
        """Adds tokens: what goes into the activation, (..., F)."""
        inputs = inputs.reshape(-1, inputs.shape[-1])
        maxima, squares = inputs.max(axis=0), mx.square(act_fn(inputs)).sum(axis=0)
        self._maxima = maxima if self._maxima is None else mx.maximum(self._maxima, maxima)
        self._squares = squares if self._squares is None else self._squares + squares
        self._tokens += inputs.shape[0]
        mx.eval(self._maxima, self._squares)

    @property
    def maxima(self) -> Floats:
        """float64 (F,)."""
        return np.array(self._maxima, dtype=np.float64)

    @property
    def importance(self) -> Floats:
        """float64 (F,): mean squares, none much below the mean."""
        squares = np.array(self._squares, dtype=np.float64) / self._tokens
        return np.maximum(squares, max(_LEAST_IMPORTANCE * float(squares.mean()), 1e-30))


def choose_factors(down: Floats, use: NeuronUse, form: Quantization, dtype: mx.Dtype) -> Floats:
    """Chooses what to multiply a down projection's columns by.

    Args:
        down: (E, F), of nn.Linear.
        use: of its neurons.
        form: it will be rounded to.
        dtype: of stored scales and biases.

    Returns:
        float32 (F,), all 1 where rescaling does not pay.
    """
    importance = use.importance
    rows = down[:: max(1, len(down) // _SAMPLED_ROWS)]
    best, best_cost = np.ones(down.shape[1], np.float32), np.inf
    for power in _POWERS:
        factors = ((importance / np.exp(np.log(importance).mean())) ** power).astype(np.float32)
        scaled = rows * factors
        rounded = round_to_nearest(scaled, form, dtype, importance / factors**2)
        cost = float((np.square((rounded.values - scaled) / factors) @ importance).sum())
        if cost < best_cost:
            best, best_cost = factors, cost
    return best
