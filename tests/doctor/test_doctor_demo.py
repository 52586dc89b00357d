"""The stored tokens: what differs by rounding may, what differs otherwise is named."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import DEMO_MODEL
from arcee_mlx.doctor import demo
from arcee_mlx.doctor.demo import STORED, TOLERANCES, Decoding, check_by_neuron, check_demo, compare, read_stored
from arcee_mlx.model.activations import relu2
from arcee_mlx.model.relu2 import down, kernels, self_check
from arcee_mlx.model.relu2.rows import Rows


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of the stored tokens instead of all."""
    prompt, stored = read_stored()
    few = Decoding(stored.tokens[:4], stored.ids[:4], stored.logits[:4])
    monkeypatch.setattr(demo, "read_stored", lambda: (prompt, few))


def make_logits(*margins: float) -> np.ndarray:
    """Logits (n, 6) whose best two are so far apart: token 3, then token 1."""
    logits = np.tile(np.array([0, 9, 1, 9, 2, 3], np.float32), (len(margins), 1))
    logits[:, 3] += margins
    return logits


def test_the_demo_computes_and_writes_what_is_stored() -> None:
    check = check_demo()
    assert check.problems == ()
    assert check.facts["tokens"] == check.facts["tokens_as_stored"] == 32 and check.facts["near_ties"] == []
    assert check.facts["error"] < 2e-4  # of what is allowed a fifth


def test_rows_of_zero_neurons_left_out_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCEE_MLX_SPARSE", "off")
    found = []
    find = down._find_active
    monkeypatch.setattr(down, "_find_active", lambda a: found.append(find(a)) or found[-1])
    check = check_by_neuron()
    assert check.problems == () and check.facts["path"] == "gathered" and check.facts["error"] == 0
    assert sum(active is not None for active in found) > 50, "rows were left out"
    assert os.environ["ARCEE_MLX_SPARSE"] == "off"


def test_what_is_stored_is_small_and_mostly_clear() -> None:
    prompt, want = read_stored()
    assert STORED.stat().st_size < 10_000 and "/" not in prompt
    for tolerance in TOLERANCES.values():
        assert sum(want.is_near_tie(step, tolerance) for step in range(32)) <= 1
    assert np.all(np.diff(want.logits, axis=-1) <= 0)


def test_logits_within_the_tolerance_are_equal_and_a_near_tie_may_turn_round() -> None:
    want = Decoding.from_logits(make_logits(1.0, 0.015, 1.0))
    assert want.tokens == (3, 3, 3) and want.ids[0].tolist() == [3, 1, 5, 4]
    got = make_logits(1.0, -0.004, 1.0)
    difference = compare(want, got, 0.02)
    assert difference.fault is None and difference.near_ties == (1,)
    assert difference.error == pytest.approx(0.019, rel=1e-3)


@pytest.mark.parametrize("changed", [0.5, np.nan, np.inf])
def test_logits_beyond_the_tolerance_are_a_fault(changed: float) -> None:
    got = make_logits(1.0, 1.0)
    got[1, 1] -= changed
    fault = compare(Decoding.from_logits(make_logits(1.0, 1.0)), got, 0.02).fault
    assert fault is not None and fault.endswith("expected 0.02 at most")


def test_another_token_without_a_near_tie_is_a_fault() -> None:
    got = make_logits(1.0, 1.0)
    got[1, 0] = 20  # a token that is not among those stored
    assert compare(Decoding.from_logits(make_logits(1.0, 1.0)), got, 0.02).fault == "token 2 is 0; expected 3"


def test_damaged_weights_are_named(short: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "demo")
    file = tmp_path / "demo" / "model.safetensors"
    weights: dict[str, Any] = mx.load(str(file))  # type: ignore[assignment]
    weights["model.layers.3.mlp.up_proj.scales"] = weights["model.layers.3.mlp.up_proj.scales"] * 1.05
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    monkeypatch.setattr(demo, "DEMO_MODEL", tmp_path / "demo")
    (problem,) = check_demo().problems
    assert problem.startswith("the demo model computes something else than it should: logits are off by")
    assert "install arcee-mlx and mlx anew" in problem


def test_a_token_that_is_written_but_not_computed_is_named(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = demo.stream_generate

    def cut_short(*arguments: Any) -> Iterator[Any]:
        return iter(list(stream(*arguments))[:2])

    monkeypatch.setattr(demo, "stream_generate", cut_short)
    check = check_demo()
    _, want = read_stored()
    assert check.facts["tokens_as_stored"] == 2
    assert f"token 3 is missing; expected {want.tokens[2]}" in check.problems[0]


def test_a_near_tie_in_what_is_written_is_said_and_no_problem(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = demo.stream_generate
    monkeypatch.setattr(demo, "TOLERANCES", {"cpu": 100.0})
    monkeypatch.setattr(demo, "stream_generate", lambda *arguments: iter(list(stream(*arguments))[:2]))
    check = check_demo()
    assert check.problems == () and "at token 3 the best two are as good as equal: either may be chosen" in check.lines


def test_a_row_that_is_lost_is_named(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    find = down._find_active
    monkeypatch.setattr(down, "_find_active", lambda a: None if (active := find(a)) is None else active[1:])
    (problem,) = check_by_neuron().problems
    assert problem.startswith("leaving out the rows of zero neurons changes the result: logits are off by")
    assert "set ARCEE_MLX_SPARSE=off" in problem


@pytest.mark.parametrize("error, path", [(0.0, "kernel"), (1.0, "dense")])
def test_on_a_gpu_the_kernel_is_compared_if_it_is_to_be_trusted(
    short: None, monkeypatch: pytest.MonkeyPatch, error: float, path: str
) -> None:
    ran = []

    def multiply(x: mx.array, rows: Rows, bias: mx.array | None, residual: mx.array) -> mx.array:
        ran.append(x.shape[0])
        return residual + rows.multiply(relu2(x))

    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(kernels, "multiply", multiply)
    monkeypatch.setattr(self_check, "measure_error", lambda *variant: error)
    monkeypatch.setattr(self_check, "_warned", [])
    self_check.find_fault.cache_clear()
    check = check_by_neuron()
    self_check.find_fault.cache_clear()
    assert check.problems == () and check.facts["path"] == path
    assert set(ran) == ({1} if path == "kernel" else set())
    words = "kernel path against all rows" if path == "kernel" else "the kernels are not to be trusted here"
    assert check.lines[0].startswith(words)
