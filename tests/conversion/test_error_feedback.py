"""Rounding with error feedback: GPTQ to the code, packed as MLX packs, and never worse than rounding to nearest."""

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.conversion import error_feedback
from arcee_mlx.conversion.error_feedback import (
    DAMPING,
    ErrorFeedback,
    choose_grid,
    correct_weight,
    damp,
    pack_codes,
    round_to_nearest,
)
from arcee_mlx.conversion.recipes import Quantization

OUT, IN = 64, 160
BITS = [2, 3, 4, 5, 6, 8]
DTYPES = [mx.float32, mx.bfloat16, mx.float16]


def random_problem(seed=0, outputs=OUT, inputs=IN):
    """A weight, and the moments of inputs that hang together and are used unequally, as those of neurons are."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(inputs, inputs // 4)) @ rng.normal(size=(inputs // 4, inputs)) / 4 + np.eye(inputs)
    x = rng.normal(size=(4 * inputs, inputs)) @ mixing * np.exp(rng.normal(size=inputs))
    return rng.normal(size=(outputs, inputs)) * 0.05, x.T @ x / len(x)


def weighted_error(weight, values, moments):
    error = weight - values
    return np.einsum("oi,ij,oj->", error, moments, error)


def textbook_gptq(weight, moments, snap):
    """GPTQ as its paper has it: the inverse of the damped moments, and what is left of the weights updated by it."""
    moments = moments + DAMPING * np.diag(moments).mean() * np.eye(len(moments))
    order = np.argsort(-np.diag(moments), kind="stable")
    inverse = np.linalg.cholesky(np.linalg.inv(moments[np.ix_(order, order)])).T
    left, codes, values = weight[:, order].astype(np.float64), {}, {}
    for i, index in enumerate(order):
        codes[index], values[index] = snap(left[:, i], index)
        left[:, i:] -= np.outer((left[:, i] - values[index]) / inverse[i, i], inverse[i, i:])
    return tuple(np.stack([part[i] for i in range(len(order))]) for part in (codes, values))


def nearest(column, scale, bias, bits):
    codes = np.clip(np.rint((column - bias) / scale), 0, 2**bits - 1).astype(np.float32)
    return codes, codes * scale + bias


@pytest.mark.parametrize("bits", BITS)
def test_by_column_it_is_gptq_with_the_most_used_inputs_first(bits):
    weight, moments = random_problem()
    form = Quantization(bits=bits, group_size=32)
    importance = np.diag(damp(moments, DAMPING))
    scales, biases = choose_grid(weight, form, mx.float32, importance)

    def snap(column, index):
        return nearest(column, scales[:, index // 32], biases[:, index // 32], bits)

    codes, values = textbook_gptq(weight, moments, snap)
    rounded = ErrorFeedback(moments).round_by_column(weight, form, mx.float32)
    np.testing.assert_array_equal(rounded.codes, codes.T)
    np.testing.assert_array_equal(rounded.values, values.T)
    assert not np.array_equal(codes.T, round_to_nearest(weight, form, mx.float32, importance).codes)


@pytest.mark.parametrize("bits", BITS)
def test_by_row_it_is_gptq_whose_grid_is_chosen_when_an_inputs_turn_comes(bits):
    weight, moments = random_problem(1)
    form = Quantization(bits=bits, group_size=32)

    def snap(column, index):
        scale, bias = (np.repeat(part[0], 32) for part in choose_grid(column[None], form, mx.bfloat16))
        return nearest(column, scale, bias, bits)

    codes, values = textbook_gptq(weight, moments, snap)
    rounded = ErrorFeedback(moments).round_by_row(weight, form, mx.bfloat16)
    np.testing.assert_array_equal(rounded.codes, codes)
    np.testing.assert_array_equal(rounded.values, values)
    assert rounded.scales.shape == (IN, OUT // 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_mlx_reads_back_exactly_the_values_that_were_chosen(bits, dtype):
    weight, moments = random_problem(2)
    form = Quantization(bits=bits, group_size=32)
    feedback = ErrorFeedback(moments)
    for rounded in (
        feedback.round_by_column(weight, form, dtype),
        feedback.round_by_row(weight, form, dtype),
        round_to_nearest(weight, form, dtype),
    ):
        codes, scales, biases = rounded.pack(form, dtype)
        assert scales.dtype == biases.dtype == dtype and codes.dtype == mx.uint32
        # What is stored is what was reckoned with: rounding scales to the dtype changed nothing more.
        np.testing.assert_array_equal(np.array(scales.astype(mx.float32)), rounded.scales)
        np.testing.assert_array_equal(np.array(biases.astype(mx.float32)), rounded.biases)
        back = mx.dequantize(codes, rounded_to_float(scales), rounded_to_float(biases), group_size=32, bits=bits)
        # MLX may multiply and add in one rounding: a last bit of float32.
        np.testing.assert_allclose(np.array(back), rounded.values, rtol=1e-6, atol=1e-8)


def rounded_to_float(values):
    return values.astype(mx.float32)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_mlx_packs_them(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (7, 128), dtype=np.uint8)
    codes[:, 0::32], codes[:, 1::32] = 0, 2**bits - 1  # each group uses all of its range, so that MLX finds scale 1
    packed, scales, biases = mx.quantize(mx.array(codes.astype(np.float32)), group_size=32, bits=bits)
    plain = np.array(mx.dequantize(packed, mx.ones_like(scales), mx.zeros_like(biases), group_size=32, bits=bits))
    np.testing.assert_array_equal(np.array(pack_codes(plain.astype(np.uint8), bits)), np.array(packed))
    ones, zeros = mx.ones((7, 4)), mx.zeros((7, 4))
    back = mx.dequantize(pack_codes(codes, bits), ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(back), codes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", BITS)
def test_the_error_that_counts_is_below_that_of_rounding_to_nearest(bits, seed):
    weight, moments = random_problem(seed)
    form = Quantization(bits=bits, group_size=32)
    feedback = ErrorFeedback(moments)
    by_column = feedback.round_by_column(weight, form, mx.bfloat16).values
    by_row = feedback.round_by_row(weight, form, mx.bfloat16).values.T
    for values, plain in (
        (by_column, round_to_nearest(weight, form, mx.bfloat16, np.diag(moments)).values),
        (by_column, mlx_nearest(weight, form)),
        (by_row, round_to_nearest(weight.T, form, mx.bfloat16).values.T),
        (by_row, mlx_nearest(weight.T, form).T),
    ):
        share = weighted_error(weight, values, moments) / weighted_error(weight, plain, moments)
        assert share <= (0.7 if bits == 4 else 1)


def mlx_nearest(weight, form):
    options = {"group_size": form.group_size, "bits": form.bits}
    packed = mx.quantize(mx.array(np.ascontiguousarray(weight), dtype=mx.bfloat16), **options)
    return np.array(mx.dequantize(*packed, **options).astype(mx.float32))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", ["dead inputs", "one direction", "nothing at all"])
def test_moments_without_an_inverse_are_rounded_with(kind, dtype):
    weight, moments = random_problem(4)
    if kind == "dead inputs":
        moments[::3], moments[:, ::3] = 0, 0
    elif kind == "one direction":
        moments = np.outer(moments[0], moments[0])
    else:
        moments[:] = 0
    form = Quantization(bits=4, group_size=32)
    feedback = ErrorFeedback(moments.astype(dtype))
    limit = weighted_error(weight, round_to_nearest(weight, form, mx.bfloat16).values, moments)
    for values in (
        feedback.round_by_column(weight.astype(dtype), form, mx.bfloat16).values,
        feedback.round_by_row(weight.astype(dtype), form, mx.bfloat16).values.T,
        correct_weight(weight.astype(dtype), np.zeros_like(weight), moments.astype(dtype)),
    ):
        assert np.isfinite(values).all() and np.abs(values - weight).max() < 0.1
        assert weighted_error(weight, values, moments) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0, 1e-9])
def test_a_group_of_equal_weights_comes_back_as_they_are(dtype, value):
    weight = np.full((2, 64), value)
    rounded = round_to_nearest(weight, Quantization(bits=4, group_size=32), dtype)
    np.testing.assert_allclose(rounded.values, weight, atol=1e-7, rtol=1e-2)
    assert (rounded.scales > 0).all()


def test_rows_by_themselves_give_what_the_whole_gives(monkeypatch):
    """As the head is rounded, some thousand rows at a time."""
    weight, moments = random_problem(5)
    form = Quantization(bits=4, group_size=32)
    feedback = ErrorFeedback(moments)
    whole = feedback.round_by_column(weight, form, mx.bfloat16)
    parts = [feedback.round_by_column(weight[start : start + 40], form, mx.bfloat16) for start in range(0, OUT, 40)]
    for name in ("codes", "scales", "biases", "values"):
        np.testing.assert_array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))
    monkeypatch.setattr(error_feedback, "_ROWS_AT_ONCE_WEIGHTS", 7 * IN)
    for found, expected in zip(choose_grid(weight, form, mx.bfloat16), choose_by_rows(weight, form), strict=True):
        np.testing.assert_array_equal(found, expected)


def choose_by_rows(weight, form):
    grids = [choose_grid(row[None], form, mx.bfloat16) for row in weight]
    return (np.concatenate(parts) for parts in zip(*grids, strict=True))


def test_a_block_of_columns_is_a_matter_of_speed(monkeypatch):
    weight, moments = random_problem(6)
    form = Quantization(bits=4, group_size=32)
    expected = ErrorFeedback(moments).round_by_column(weight, form, mx.float32).codes
    for columns in (1, 50, IN):
        monkeypatch.setattr(error_feedback, "_BLOCK_COLUMNS", columns)
        np.testing.assert_array_equal(ErrorFeedback(moments).round_by_column(weight, form, mx.float32).codes, expected)


def test_the_corrected_weight_solves_the_least_squares_problem(monkeypatch):
    monkeypatch.setattr(error_feedback, "CORRECTION_DAMPING", 1e-12)
    rng = np.random.default_rng(7)
    weight, x = rng.normal(size=(OUT, IN)), rng.normal(size=(4 * IN, IN)) * np.exp(rng.normal(size=IN))
    wanted = (x + 0.1 * rng.normal(size=x.shape)) @ weight.T + np.tanh(x[:, :OUT])
    shift = (wanted - x @ weight.T).T @ x / len(x)
    solution = np.linalg.lstsq(x, wanted, rcond=None)[0].T
    np.testing.assert_allclose(correct_weight(weight, shift, x.T @ x / len(x)), solution, atol=1e-7)
    assert np.abs(weight - solution).max() > 0.01


def test_a_correction_moves_no_row_by_more_than_half_its_length_and_small_ones_are_whole():
    rng = np.random.default_rng(3)
    weight, moments = rng.normal(size=(6, 16)), np.eye(16)
    shift = rng.normal(size=(6, 16)) * np.array([[0.01], [0.01], [0.01], [9], [9], [9]])
    change = correct_weight(weight, shift, moments) - weight
    share = np.linalg.norm(change, axis=1) / np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(share[3:], 0.5, rtol=1e-9)
    np.testing.assert_allclose(change[:3], shift[:3] / 1.1, rtol=1e-9)
