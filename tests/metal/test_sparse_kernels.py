"""The sparse kernels' own text, run in an emulated GPU: right for every form and launch, under every schedule."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.model.relu2 import kernels

from emulator import SCHEDULES, EmulationError, write_source
from sparse_cases import CASES, NAMES, check, make_layer, scale_weights

SOURCES = [kernels._FOLDER / f"{name}.metal" for name in ("sparse_product", "sum_partials")]


@pytest.mark.parametrize(",".join(NAMES), CASES)
def test_kernels_give_the_product_in_every_order_of_threads_to_the_bit(
    emulator, tokens, neurons, hidden, bits, group_size, dtype
):
    layer = make_layer(tokens, neurons, hidden, bits=bits, group_size=group_size, dtype=dtype)
    results = []
    for emulator.schedule in SCHEDULES.values():
        results.append(check(layer).view(mx.uint8))
    assert all(mx.array_equal(result, results[0]) for result in results)

    emulator.schedule = SCHEDULES["in turn"]
    nothing = replace(layer, x=-mx.abs(layer.x))
    alone = mx.where(mx.arange(neurons) == neurons - 1, mx.abs(layer.x), -0.0)
    check(nothing)
    check(replace(layer, x=mx.concatenate([alone[:1], nothing.x[1:]])))
    check(replace(layer, x=mx.abs(layer.x)))


@pytest.mark.parametrize("has_bias, has_residual", [(False, False), (True, False), (False, True)])
def test_bias_and_residual_are_added_where_there_are_any(emulator, has_bias, has_residual):
    layer = make_layer(2, 75, 384, bits=4, group_size=128, dtype=mx.float16)
    bias, residual = layer.bias if has_bias else None, layer.residual if has_residual else None
    check(replace(layer, bias=bias, residual=residual))


def test_nan_in_an_activation_reaches_that_token_and_no_other(emulator):
    layer = make_layer(2, 75, 384, bits=4, group_size=128, dtype=mx.float16)
    x = mx.where((mx.arange(75) == 40) & (mx.arange(2)[:, None] == 1), mx.nan, layer.x)
    y = check(replace(layer, x=x))
    assert mx.isnan(y[1]).all() and not mx.isnan(y[0]).any()


def test_squares_beyond_float16_are_summed_in_float32(emulator):
    layer = make_layer(2, 75, 384, bits=4, group_size=128, dtype=mx.float16)
    check(scale_weights(replace(layer, x=layer.x * 400), 1e-3))


@pytest.mark.parametrize("threadgroups", [1, 5, 10_000])
def test_any_number_of_slabs_gives_the_product(emulator, monkeypatch, threadgroups):
    monkeypatch.setattr(kernels, "_FILLS_A_GPU", threadgroups)
    kernels._settings.cache_clear()
    check(make_layer(1, 330, 320, bits=4, group_size=64, dtype=mx.float32))


def test_every_plan_fits_the_kernel():
    widths = [32, 64, 96, 2560, 4096, 5120, 8192]
    for tokens, hidden, bits, neurons in itertools.product(
        range(1, 9), widths, (4, 8, None), (8, 1000, 18432, 200_000)
    ):
        dtype = mx.uint32 if bits else mx.float16
        plan = kernels.plan_product(tokens, neurons, hidden, dtype, bits or 16)
        chunks = -(-neurons // 32)
        line, per_word = 128 // dtype.size, 32 // bits if bits else 1
        assert plan.block == line * per_word <= 256
        assert plan.words * dtype.size <= 16 and line // plan.words <= 32 and 32 % (line // plan.words) == 0
        assert plan.words * per_word <= 32 and hidden % (plan.words * per_word) == 0
        assert tokens * plan.words * per_word <= 64  # sums in registers
        assert plan.slabs <= chunks <= 32 * plan.slabs


def test_the_text_emulated_is_what_mlx_compiles_and_names_what_it_takes(emulator):
    layer = make_layer(2, 75, 384, bits=4, group_size=128, dtype=mx.float16)
    check(layer)
    for path in SOURCES:
        text = emulator.sources[f"arcee_{path.stem}"]
        body = path.read_text()
        assert body in text
        for name in re.findall(r"^\[\[kernel\]\]|(\w+) \[\[buffer", text, re.M):
            assert not name or re.search(rf"\b{name}\b", body)
        assert "constant" not in text.split("{")[1], "MLX hands an input of fewer than 8 elements over as constant"
        assert not re.search(r"_shape|_strides|_ndim", text), "MLX adds parameters for such names, in comments too"


def test_a_kernel_runs_the_same_on_a_view_of_a_larger_array(emulator):
    layer = make_layer(2, 75, 384, bits=4, group_size=128, dtype=mx.float16)
    wide = mx.concatenate([layer.x, layer.x], axis=1)[:, :75]
    assert mx.array_equal(layer.run(), replace(layer, x=wide).run())


# Each is a mistake that would be easy to make; (what stands in the text, what to write instead, how often it stands there).
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
MUTATIONS = {
    "no barrier before the masks are read": (BARRIER, "", 0),
    "no barrier before the list is read": (BARRIER, "", 1),
    "no barrier before the sums are read": (BARRIER, "", 2),
    "no barrier before the sums are written again": (BARRIER, "", 3),
    "a barrier inside a branch": (BARRIER, f"if (column < HIDDEN) {BARRIER}", 2),
    "a ballot inside a branch": ("simd_ballot(active)", "(lane < 20 ? simd_ballot(active) : simd_vote{1})", 0),
    "a shuffle inside a branch": ("total += simd_shuffle_xor", "if (lane < 30) total += simd_shuffle_xor", 0),
    "an inclusive prefix": ("simd_prefix_exclusive_sum(", "popcount(mask) + simd_prefix_exclusive_sum(", 0),
    "a prefix that counts the lane itself": ("((1u << lane) - 1)", "((2u << lane) - 1)", 0),
    "neurons past the end are read": ("if (neuron < NEURONS)", "if (true)", 0),
    "the list is read past its end": ("min(first + u * STRIDE, count - 1)", "first + u * STRIDE", 0),
    "columns past the end are read": ("if (column < HIDDEN)", "if (true)", 0),
    "columns past the end are written": (" && block + thread_column < HIDDEN", "", 0),
    "the tail is counted": ("first + u * STRIDE >= count || ", "", 0),
    "NaN counts as zero": ("!(float(x[m * NEURONS + neuron]) <= 0.0f)", "float(x[m * NEURONS + neuron]) > 0.0f", 0),
    "only the first token's neurons are listed": ("active = active || ", "active = m ? active : ", 0),
    "squares in T": ("const float value = float(", "const T value = T(", 0),
    "biases left out": ("offset[m] = fma(neuron, bias[u], offset[m])", "", 0),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_mistake_in_the_kernel_is_seen(emulator, monkeypatch, mutation):
    old, new, place = MUTATIONS[mutation]
    kernels._settings.cache_clear()
    monkeypatch.setattr(kernels, "_FILLS_A_GPU", 1)  # all chunks in one slab: every simdgroup has work
    layer = make_layer(2, 330, 288, bits=4, group_size=32, dtype=mx.float16)
    layer = scale_weights(replace(layer, x=layer.x * 300), 1e-3)  # squares are beyond float16, their sums are not
    layer = replace(layer, x=mx.where(mx.arange(330) == 329, 300, layer.x))  # the last row is read
    nan = replace(layer, x=mx.where((mx.arange(330) == 77) & (mx.arange(2)[:, None] == 1), mx.nan, layer.x))
    check(layer)

    def edit(source: str) -> str:
        parts = source.split(old)
        if len(parts) == 1:
            return source  # of the other kernel
        return old.join(parts[: place + 1]) + new + old.join(parts[place + 1 :])

    kernels._build.cache_clear()
    emulator.edit = edit
    assert any(edit(path.read_text()) != path.read_text() for path in SOURCES)
    with pytest.raises((AssertionError, EmulationError)) as seen:
        for emulator.schedule in SCHEDULES.values():
            check(layer)
            check(nan)
    assert "g++" not in str(seen.value), "the mistake should run, and be wrong"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("bits, group_size", [*itertools.product((4, 8), (32, 64, 128)), (None, None)])
def test_every_form_and_number_of_tokens(emulator, bits, group_size, dtype):
    for tokens in range(1, 9):
        layer = make_layer(tokens, 203, 384, bits=bits, group_size=group_size, dtype=dtype)
        results = []
        for emulator.schedule in SCHEDULES.values():
            results.append(check(layer).view(mx.uint8))
        assert all(mx.array_equal(result, results[0]) for result in results)
        for zeros in (0.0, 0.5, 0.95, 1.0):
            check(make_layer(tokens, 203, 384, bits=bits, group_size=group_size, dtype=dtype, zeros=zeros))


@pytest.mark.slow
def test_afm_45b_at_its_own_size(emulator):
    check(make_layer(1, 18432, 2560, bits=4, group_size=64, dtype=mx.bfloat16, zeros=0.9))


def test_emulated_floats_round_as_mlx_does(emulator):
    kernel = mx.fast.metal_kernel("cast", ["x"], ["y"], "uint i = thread_position_in_grid.x; y[i] = T(x[i]);")
    odd = [
        0.0,
        -0.0,
        1e-8,
        5.9e-8,
        6e-5,
        65504.0,
        65519.0,
        65520.0,
        3.4e38,
        float("inf"),
        2049.0,
        2051.0,
        1.00390625,
        1e-40,
    ]
    x = mx.concatenate([mx.array(odd), mx.random.normal((500,), key=mx.random.key(0))])
    for dtype in (mx.float16, mx.bfloat16):
        (y,) = kernel(
            inputs=[x], template=[("T", dtype)], grid=(x.size, 1, 1), threadgroup=(64, 1, 1),
            output_shapes=[x.shape], output_dtypes=[dtype],
        )  # fmt: skip
        want = x.astype(dtype)
        same = np.asarray(y.view(mx.uint16)) == np.asarray(want.view(mx.uint16))
        assert same.all(), [(x[i].item(), y[i].item(), want[i].item()) for i in np.flatnonzero(~same)[:5]]


def test_the_source_is_what_mlx_prints_for_a_trace():
    kernel = mx.fast.metal_kernel("twice", ["x"], ["y"], "y[thread_position_in_grid.x] = 2 * x[0];")
    launch = {"grid": (8, 1, 1), "threadgroup": (8, 1, 1), "output_shapes": [(8,)], "output_dtypes": [mx.float32]}
    text = write_source(kernel, [mx.zeros((8,))], launch)
    assert "[[kernel]] void custom_kernel_twice" in text and "y[thread_position_in_grid.x] = 2 * x[0];" in text
