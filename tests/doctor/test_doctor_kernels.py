"""The comparison of down projections: all forms, right where they are right, and every fault in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.doctor.kernels import Variant, check_kernels, list_variants
from arcee_mlx.model.activations import relu2
from arcee_mlx.model.relu2 import down, kernels
from arcee_mlx.model.relu2.rows import Rows

from emulator import Emulator

ONE = Variant("kernel", mx.float32, 4, 32, 1, True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX says that its default device is a GPU, and computes where it did."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)


def multiply_plainly(x: mx.array, rows: Rows, bias: mx.array | None, residual: mx.array) -> mx.array:
    """Stands in for the kernels: the same sum, in float32."""
    assert kernels.explain_unserved(x, rows, bias) is None
    y = relu2(x.astype(mx.float32)) @ rows.unpack().astype(mx.float32) + residual
    return (y if bias is None else y + bias).astype(x.dtype)


def test_on_the_cpu_every_path_and_form_is_right_and_kernels_are_said_not_to_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    variants = list_variants(on_gpu=False)
    assert {v.path for v in variants} == {"gathered", "dense"} and {v.bits for v in variants} == {
        None,
        2,
        3,
        4,
        5,
        6,
        8,
    }
    check = check_kernels()
    assert check.problems == () and check.facts["products"] == len(variants)
    assert check.facts["kernels_were_run"] is False and check.facts["faults"] == {}
    assert "the GPU's kernels were not run: MLX computes on the CPU here" in check.lines
    assert all(0 < entry["error"] <= entry["allowed"] for entry in check.facts["worst"])
    assert capsys.readouterr().err == ""  # no bar where there is no terminal


def test_on_a_gpu_every_form_that_the_kernels_serve_is_run(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    variants = list_variants(on_gpu=True)
    dtypes = (mx.float32, mx.float16, mx.bfloat16)
    packed = itertools.product(dtypes, (4, 8), (32, 64, 128), range(1, 9), (True, False))
    floats = itertools.product(dtypes, (None,), (None,), range(1, 9), (True, False))
    small = {(v.dtype, v.bits, v.group_size, v.tokens, v.has_bias) for v in variants if v.shape is None}
    assert small == {*packed, *floats}
    assert {(v.tokens, v.shape) for v in variants if v.shape} == {(1, (18_432, 2_560)), (8, (18_432, 2_560))}
    monkeypatch.setattr(kernels, "multiply", multiply_plainly)
    check = check_kernels([*variants[:336:5], replace(variants[-1], shape=(500, 256))])
    assert check.problems == () and check.facts["kernels_were_run"] is True
    assert check.lines[0].startswith("the GPU's kernels against float64: 69 products")
    assert any(line.startswith("bfloat16, 4 bits, AFM-4.5B") for line in check.lines)


def test_the_kernels_own_text_passes(gpu: None, emulator: Emulator) -> None:
    check = check_kernels([ONE])
    assert check.problems == () and check.facts["products"] == 1


@pytest.mark.parametrize(
    "wrong, right, fault",
    [
        ("fma(scaled[m]", "fma(2.0f * scaled[m]", "off by"),
        ("threadgroup_barrier", "no_such_barrier", "no_such_barrier"),
    ],
)
def test_a_wrong_kernel_and_one_that_does_not_compile_are_named(
    gpu: None, emulator: Emulator, wrong: str, right: str, fault: str
) -> None:
    emulator.edit = lambda source: source.replace(wrong, right)
    check = check_kernels([ONE])
    (problem,) = check.problems
    assert problem.startswith(
        "1 of 1 products are wrong, the first: kernel, 4 bits in groups of 32, float32, 1 tokens, a bias:"
    )
    assert (
        fault in problem
        and "set ARCEE_MLX_SPARSE=off, which reads all rows" in problem
        and "`arcee-mlx doctor --json`" in problem
    )
    assert list(check.facts["faults"]) == [str(ONE)]


def test_a_kernel_that_gives_other_bits_the_second_time_is_named(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    noise: Iterator[float] = itertools.cycle([0.0, 1e-6])
    monkeypatch.setattr(kernels, "multiply", lambda *arguments: multiply_plainly(*arguments) + next(noise))
    (problem,) = check_kernels([ONE]).problems
    assert "two runs differ; expected the same bits" in problem


def test_a_kernel_that_gives_nan_is_named_and_json_has_no_infinity(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "multiply", lambda *arguments: multiply_plainly(*arguments) * mx.nan)
    check = check_kernels([ONE])
    assert "off by inf of the largest output" in check.problems[0]
    assert check.facts["worst"][0]["error"] is None


def test_a_gathered_row_that_is_lost_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = down._find_active

    def lose_one(a: mx.array) -> mx.array | None:
        active = find(a)
        assert active is not None
        return active[1:]

    monkeypatch.setattr(down, "_find_active", lose_one)
    (problem,) = check_kernels([Variant(path, mx.float32, 4, 64, 2, True) for path in ("gathered", "dense")]).problems  # type: ignore[arg-type]
    assert "1 of 2 products are wrong, the first: gathered, 4 bits in groups of 64, float32, 2 tokens" in problem
    assert "set ARCEE_MLX_SPARSE=off, which reads all rows" in problem


def test_where_all_rows_give_a_wrong_sum_too_the_variable_is_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = Rows.multiply
    monkeypatch.setattr(Rows, "multiply", lambda *arguments: 1.01 * multiply(*arguments))
    (problem,) = check_kernels([Variant("dense", mx.float32, 4, 64, 2, True)]).problems
    assert "install mlx anew" in problem and "ARCEE_MLX_SPARSE" not in problem


def test_the_gathered_path_is_one_that_leaves_rows_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    find = down._find_active
    monkeypatch.setattr(down, "_find_active", lambda a: found.append(find(a)) or found[-1])
    check_kernels([v for v in list_variants(on_gpu=False) if v.path == "gathered" and v.bits == 4])
    assert found and all(active is not None for active in found)
    assert max(np.array(active).size for active in found) < 100
