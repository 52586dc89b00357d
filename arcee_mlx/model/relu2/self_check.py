"""Is a kernel of this device to be trusted? Before its first use it computes a small layer that is known otherwise.

A kernel is compiled for the bits, group size, dtype and number of tokens it is used with: each such variant is checked.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np

from . import kernels
from .rows import Rows

# Of the largest output: rounding, with room. A wrong index or a lost row is far above.
TOLERANCES = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
NEURONS = 200  # no multiple of 32: the last chunk is not full
_warned: list[str] = []


@functools.cache
def find_fault(dtype: mx.Dtype, bits: int | None, group_size: int | None, tokens: int) -> str | None:
    """What is wrong with a variant of the kernels on this device, None if nothing. Once a process, and then known.

    The first fault of a process is a warning too, with what to do about it.
    """
    try:
        error = measure_error(dtype, bits, group_size, tokens)
    except (RuntimeError, ValueError) as problem:  # the source did not compile, or the device refused it
        fault = " ".join(str(problem).split())[:600]
    else:
        if error <= TOLERANCES[dtype]:
            return None
        fault = f"off by {error:.2g} of the largest output, more than {TOLERANCES[dtype]:.2g}"
    form = f"{bits} bits in groups of {group_size}" if bits else "floats"
    fault = f"the sparse kernel for {form}, {dtype}, {tokens} tokens: {fault}"
    if not _warned:
        _warned.append(fault)
        warnings.warn(
            f"{fault}. Down projections are computed in full instead: right, but slower. Please report this text with "
            f"the output of `arcee-mlx doctor`; ARCEE_MLX_SPARSE=off leaves the kernel alone.",
            RuntimeWarning,
            stacklevel=2,
        )
    return fault


def measure_error(
    dtype: mx.Dtype,
    bits: int | None,
    group_size: int | None,
    tokens: int,
    *,
    multiply: Callable[[mx.array, Rows, mx.array | None, mx.array], mx.array] = kernels.multiply,
    has_bias: bool = True,
    zeros: float = 0.5,
    shape: tuple[int, int] | None = None,
) -> float:
    """The largest difference between the kernels and float64 on a small random layer, over the largest output.

    Args:
        dtype, bits, group_size, tokens: of the variant; bits and group_size None for rows of floats.
        multiply: what is compared, called as `kernels.multiply` is.
        has_bias: whether the layer has a bias.
        zeros: share of the neurons that are zero for a token.
        shape: neurons and hidden of the layer; None is 200 and three groups.
    """
    neurons, hidden = shape or (NEURONS, 3 * (group_size or 104))
    keys = mx.random.split(mx.random.key(0), 5)
    shapes = ((tokens, neurons), (neurons, hidden), (hidden,), (tokens, hidden))
    x, weights, bias, residual = (
        mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys[:4], strict=True)
    )
    x = mx.where(mx.random.uniform(shape=x.shape, key=keys[4]) < zeros, -mx.abs(x), mx.abs(x))
    rows = plain = Rows(weights)
    if bits is not None:
        packed, scales, biases = mx.quantize(weights, group_size, bits)
        rows = Rows(packed, scales, biases, bits, group_size)
        plain = replace(rows, scales=scales.astype(mx.float32), biases=biases.astype(mx.float32))
    got = _to_float64(multiply(x, rows, bias if has_bias else None, residual))
    want = np.square(np.maximum(_to_float64(x), 0)) @ _to_float64(plain.unpack()) + _to_float64(residual)
    want += _to_float64(bias) if has_bias else 0
    error = np.abs(got - want).max() / np.abs(want).max()
    return float(error) if np.isfinite(error) else np.inf


def _to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)
