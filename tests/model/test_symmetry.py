"""The exact symmetries of squared ReLU: rescaled and reordered neurons are the same function, and bounds hold."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.model.activations import relu2
from arcee_mlx.model.relu2.symmetry import (
    FLOAT16_LIMIT,
    bound_neurons,
    fold_exponents,
    permute_neurons,
    rescale_neurons,
)

E, F = 64, 128
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def random_mlp(dtype: mx.Dtype = mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    """up, down and up's bias, in steps so coarse that what they give is 0 or far above float16's smallest numbers."""
    mx.random.seed(3)
    up, down = (mx.round(mx.random.normal(shape) * 4) / 4 for shape in ((F, E), (E, F)))
    return up.astype(dtype), down.astype(dtype), (mx.round(mx.random.normal((F,)) * 8) / 8).astype(dtype)


def run(x: mx.array, up: mx.array, down: mx.array, bias: mx.array) -> mx.array:
    return relu2(x @ up.T + bias) @ down.T


def inputs(dtype: mx.Dtype = mx.float32) -> mx.array:
    return (mx.round(mx.random.normal((16, E), key=mx.random.key(5)) * 2) / 2).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_powers_of_two_change_no_bit(dtype: mx.Dtype) -> None:
    up, down, bias = random_mlp(dtype)
    factors = mx.array(np.exp2(-np.random.default_rng(0).integers(0, 3, F)).astype(np.float32))
    x = inputs(dtype)
    hidden = relu2(x @ up.T + bias)
    # Squares below the normal range would lose bits: here they are 0, or stay above it when they are scaled.
    assert mx.where(hidden == 0, 1, hidden).min().item() * 2.0**-4 >= 2.0**-14 and hidden.max().item() < 65504
    scaled = rescale_neurons(up, down, factors, bias)
    assert scaled[2] is not None and [part.dtype for part in scaled if part is not None] == [dtype] * 3
    assert not mx.array_equal(scaled[0], up).item()
    assert mx.array_equal(run(x, *scaled), run(x, up, down, bias)).item()


def test_any_positive_factor_changes_nothing_but_rounding() -> None:
    up, down, bias = random_mlp()
    factors = mx.random.uniform(0.1, 9.0, (F,), key=mx.random.key(1))
    up_scaled, down_scaled, bias_scaled = rescale_neurons(up, down, factors, bias)
    assert bias_scaled is not None
    expected = run(inputs(), up, down, bias)
    assert mx.allclose(run(inputs(), up_scaled, down_scaled, bias_scaled), expected, rtol=1e-4, atol=1e-3).item()
    assert mx.abs(expected).max().item() > 10


def test_any_order_of_the_neurons_is_the_same_function() -> None:
    up, down, bias = random_mlp()
    order = mx.array(np.random.default_rng(2).permutation(F))
    moved = permute_neurons(up, down, order, bias)
    assert moved[2] is not None and not mx.array_equal(moved[0], up).item()
    assert mx.array_equal(moved[2], bias[order]).item()
    assert mx.allclose(run(inputs(), *moved), run(inputs(), up, down, bias), rtol=1e-4, atol=1e-3).item()


@pytest.mark.parametrize("change", [rescale_neurons, permute_neurons])
def test_without_a_bias_there_is_none(change) -> None:  # type: ignore[no-untyped-def]
    up, down, _ = random_mlp()
    assert change(up, down, mx.arange(F), None)[2] is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_no_input_takes_a_neuron_above_its_bound(dtype: mx.Dtype, has_bias: bool) -> None:
    up, _, bias = random_mlp(dtype)
    norm = mx.random.normal((E,), key=mx.random.key(8)).astype(dtype)
    own_bias = mx.abs(bias) if has_bias else None
    bound = bound_neurons(up, norm, own_bias)
    # The input that goes furthest lies along the neuron's row times the norm's weight: Cauchy-Schwarz is tight there.
    aligned = (up.astype(mx.float32) * norm.astype(mx.float32)).astype(dtype)
    for x in (aligned, 100 * aligned, 1e4 * mx.random.normal((500, E)).astype(dtype)):
        reached = mx.fast.rms_norm(x, norm, 1e-5) @ up.T
        if own_bias is not None:
            reached = reached + own_bias
        assert (np.array(reached.astype(mx.float32), np.float64) <= bound).all()
    best = np.diag(np.array((mx.fast.rms_norm(100 * aligned, norm, 1e-5) @ up.T).astype(mx.float32)))
    if own_bias is not None:
        best = best + np.array(own_bias.astype(mx.float32))
    assert (best > 0.96 * bound).all()  # nor is it far above what can be reached
    assert bound.dtype == np.float64 and bound.shape == (F,)


def test_exponents_are_the_smallest_that_keep_squares_finite() -> None:
    maxima = np.concatenate([np.geomspace(1e-3, 1e7, 501), FLOAT16_LIMIT * np.exp2(np.arange(8)), [255.9, 256.0, -4.0]])
    exponents = fold_exponents(maxima)
    squares = np.square(np.maximum(maxima, 0) * np.exp2(-exponents))
    assert exponents.dtype == np.int32 and (squares <= 65504 * (1 + 1e-12)).all()
    assert (exponents >= 0).all()
    larger = exponents > 0
    assert larger.sum() > 100 and (4 * squares[larger] > 65504).all()  # one less would be too few


def test_neurons_of_a_group_share_the_exponent_that_the_largest_needs() -> None:
    maxima = np.array([1.0, 300.0, 2.0, 3.0, 5.0, 6.0, 2000.0, 600.0, 9.0, 9.0, 9.0, 9.0])
    assert fold_exponents(maxima).tolist() == [0, 1, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0]
    assert fold_exponents(maxima, 4).tolist() == [1] * 4 + [3] * 4 + [0] * 4


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_maximum_that_is_not_finite_leaves_its_neuron_alone(value: float) -> None:
    assert fold_exponents(np.array([value, 600.0])).tolist() == [0, 2]
