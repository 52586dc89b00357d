"""Random layers for the sparse kernels, and what they should give, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from arcee_mlx.model.relu2 import kernels
from arcee_mlx.model.relu2.rows import Rows

# Of the largest output: sums of some hundred terms in float32, then one rounding to the dtype.
TOLERANCES = {mx.float32: 2e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}

# tokens, neurons, hidden, bits, group size, dtype: together all of each, and sizes that nothing divides.
CASES = [
    (1, 203, 320, 4, 64, mx.float32),
    (2, 75, 384, 4, 128, mx.float16),
    (3, 330, 96, 8, 32, mx.bfloat16),
    (4, 130, 88, None, None, mx.float16),
    (5, 41, 192, 8, 64, mx.float32),
    (6, 70, 40, None, None, mx.float32),
    (7, 8, 256, 8, 128, mx.float16),
    (8, 1100, 32, 4, 32, mx.bfloat16),
]
NAMES = ["tokens", "neurons", "hidden", "bits", "group_size", "dtype"]


@dataclass(frozen=True)
class Layer:
    """A down projection with what comes into it; `weights` is what `rows` stand for, in float32."""

    x: mx.array
    rows: Rows
    weights: mx.array
    bias: mx.array | None
    residual: mx.array | None

    def expect(self) -> np.ndarray:
        """relu2(x) @ weights + bias + residual, float64 (M, E)."""
        y = np.square(np.maximum(to_float64(self.x), 0)) @ to_float64(self.weights)
        return y + sum(to_float64(extra) for extra in (self.bias, self.residual) if extra is not None)

    def run(self) -> mx.array:
        return kernels.multiply(self.x, self.rows, self.bias, self.residual)


def make_layer(
    tokens: int, neurons: int, hidden: int, *, bits: int | None, group_size: int | None, dtype: mx.Dtype,
    zeros: float = 0.8, extras: bool = True,
) -> Layer:  # fmt: skip
    """A layer with a share of `zeros` among the neurons; bits None is rows of floats."""
    keys = mx.random.split(mx.random.key(tokens * neurons + hidden), 5)
    shapes = ((tokens, neurons), (neurons, hidden), (hidden,), (tokens, hidden))
    x, weights, bias, residual = (
        mx.random.normal(shape, key=key).astype(dtype) for shape, key in zip(shapes, keys, strict=False)
    )
    x = mx.where(mx.random.uniform(shape=x.shape, key=keys[4]) < zeros, -mx.abs(x), mx.abs(x))
    rows = plain = Rows(weights)
    if bits is not None:
        packed, scales, biases = mx.quantize(weights, group_size, bits)
        rows = Rows(packed, scales, biases, bits, group_size)
        plain = replace(rows, scales=scales.astype(mx.float32), biases=biases.astype(mx.float32))
    return Layer(x, rows, plain.unpack(), bias if extras else None, residual if extras else None)


def scale_weights(layer: Layer, factor: float) -> Layer:
    """A packed layer whose weights are `factor` times as large."""
    scales, biases = (array * factor for array in (layer.rows.scales, layer.rows.biases))
    rows = replace(layer.rows, scales=scales, biases=biases)
    plain = replace(rows, scales=scales.astype(mx.float32), biases=biases.astype(mx.float32))
    return replace(layer, rows=rows, weights=plain.unpack())


def check(layer: Layer) -> mx.array:
    """Runs a layer; it gives what it should."""
    y = layer.run()
    want, got = layer.expect(), to_float64(y)
    assert y.shape == want.shape and y.dtype == layer.x.dtype
    assert np.array_equal(np.isnan(got), np.isnan(want)), "NaN where there should be none, or none where it should be"
    error = np.nanmax(np.abs(got - want), initial=0) / max(np.nanmax(np.abs(want), initial=0), 1e-30)
    assert error <= TOLERANCES[layer.x.dtype], f"off by {error:.2g} of the largest output"
    return y


def to_float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), dtype=np.float64)
