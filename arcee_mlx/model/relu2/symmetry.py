"""Exact re-parametrisations of down(relu(up(x))²): neurons may be scaled and reordered, and nothing else changes.

relu(d x)² = d² relu(x)² for d > 0: up's row times d and down's column over d² are the same function; for a power of two
to the bit, as long as nothing falls below the smallest normal number. Any order of the neurons is, too.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

# The largest float16 is 65504: a neuron whose input reaches its square root overflows when it is squared.
FLOAT16_LIMIT = math.sqrt(65504.0)


def rescale_neurons(
    up: mx.array, down: mx.array, factors: mx.array, up_bias: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Scales neurons before their activation and takes it back after it.

    Args:
        up: (F, E).
        down: (E, F).
        factors: (F,), positive; powers of two for equal bits.
        up_bias: (F,), or None.

    Returns:
        up, down and up_bias of the same function, in their dtypes.
    """
    scaled_up = (up * factors[:, None]).astype(up.dtype)
    scaled_down = (down / mx.square(factors)[None]).astype(down.dtype)
    return scaled_up, scaled_down, None if up_bias is None else (up_bias * factors).astype(up_bias.dtype)


def permute_neurons(
    up: mx.array, down: mx.array, order: mx.array, up_bias: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Puts neurons into another order: `order` (F,) holds each old index once; shapes as in `rescale_neurons`."""
    return up[order], down[:, order], None if up_bias is None else up_bias[order]


def bound_neurons(up: mx.array, norm: mx.array, up_bias: mx.array | None = None) -> np.ndarray:
    """The most that a neuron's input can be, whatever the text.

    RMSNorm gives vectors of length at most sqrt(E) before its weight, so |up x| <= sqrt(E) |up * norm| (Cauchy-Schwarz).
    A part in 64 is added for the rounding of half precision: of the normed vector, its weight, the product and the sum.

    Args:
        up: (F, E).
        norm: (E,), the weight of the norm that feeds it.
        up_bias: (F,), or None.

    Returns:
        float64 (F,).
    """
    rows = up.astype(mx.float32) * norm.astype(mx.float32)
    lengths = np.array(mx.sqrt(mx.sum(mx.square(rows), axis=1)), dtype=np.float64)
    bound = math.sqrt(up.shape[1]) * lengths
    if up_bias is not None:
        bound += np.abs(np.array(up_bias.astype(mx.float32), dtype=np.float64))
    return bound * (1 + 2**-6)


def fold_exponents(maxima: np.ndarray, group_size: int = 1) -> np.ndarray:
    """The smallest powers of two that keep float16 squares finite: neurons are scaled by 2**-exponent.

    Args:
        maxima: (F,), the most each neuron's input is or can be.
        group_size: neurons that share an exponent, since they share a scale of a quantized down projection.

    Returns:
        int32 (F,), 0 where nothing can overflow, and where the maximum is not finite and nothing helps.
    """
    needed = np.ceil(np.log2(np.maximum(maxima, FLOAT16_LIMIT) / FLOAT16_LIMIT))
    exponents = np.where(np.isfinite(needed), needed, 0).astype(np.int32)
    return np.repeat(exponents.reshape(-1, group_size).max(axis=1), group_size)
