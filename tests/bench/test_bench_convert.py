"""`arcee-mlx bench convert` on tiny shapes: it measures what it says, and its lines hold the ratios. Nothing is timed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import ArceeError, ConversionError, load_model
from arcee_mlx.bench.afm_shape import AFM_CONFIG, count_weights, write_checkpoint
from arcee_mlx.bench.convert import (
    Measurement,
    ShapeResult,
    describe_growth,
    describe_shape,
    find_difference,
    measure_shape,
    measure_speed,
)
from arcee_mlx.bench.convert_process import convert_in_process
from arcee_mlx.checkpoint.files import open_checkpoint
from arcee_mlx.cli import main
from arcee_mlx.model.config import read_config

from conftest import TEXT

TINY = AFM_CONFIG | {
    "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 200,
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ShapeResult]:
    """A tiny source, what both converters made of it in two runs, and what that took; read only."""
    folder = tmp_path_factory.mktemp("measured")
    return folder, measure_shape(folder, 2, runs=2, config=TINY)


def test_the_shape_is_afms_and_the_same_each_time(tmp_path: Path) -> None:
    assert 2 * count_weights(36) == pytest.approx(9.24e9, rel=1e-3)
    for name in ("a", "b"):
        assert write_checkpoint(tmp_path / name, 2, config=TINY) == 2 * count_weights(2, TINY)
    assert find_difference(tmp_path / "a", tmp_path / "b") is None
    weights = dict(open_checkpoint(tmp_path / "a").arrays())
    assert {value.dtype for value in weights.values()} == {mx.bfloat16}
    names = ("model.embed_tokens.weight", "lm_head.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)))
    blocks = [np.array(weights[name].astype(mx.float32)) for name in names]
    assert all(np.std(block) == pytest.approx(0.02, rel=0.05) for block in blocks)
    assert len({block[0].tobytes() for block in blocks}) == 4
    load_model(tmp_path / "a")


def test_speed_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = measure_speed([2, 1, 2], runs=1, work=tmp_path, config=TINY)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert "4 bits in groups of 64" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["1", "arcee_mlx", "mlx_lm", "ratio", "2", "arcee_mlx", "mlx_lm", "ratio", "growth"]  # fmt: skip
    assert re.search(r"time \d+\.\d{3}, memory \d+\.\d{3} \(arcee_mlx / mlx_lm\); weights equal to the bit", lines[4])
    assert re.search(r"from 1 to 2 layers: arcee_mlx .* \(x \d\.\d\d\), mlx_lm .* \(x \d\.\d\d\)", lines[-1])
    assert captured.err and list(tmp_path.iterdir()) == []
    assert [shape["layers"] for shape in values["shapes"]] == [1, 2]
    json.dumps(values)


def test_what_is_measured_is_what_was_written(measured: tuple[Path, ShapeResult]) -> None:
    folder, result = measured
    assert result.layers == 2 and result.source_bytes == 2 * count_weights(2, TINY)
    for name, each in (("arcee_mlx", result.ours), ("mlx_lm", result.theirs)):
        assert len(each.seconds) == 2 and min(each.seconds) > 0 and each.peak_bytes > 2**24
        assert 0 <= (folder / name / "model.safetensors").stat().st_size - each.output_bytes < 10_000
        assert (
            each.bits_per_weight == 8 * each.output_bytes / count_weights(2, TINY) and 4.5 < each.bits_per_weight < 4.6
        )
    assert result.ours.output_bytes == result.theirs.output_bytes and result.difference is None


def test_ratios_are_ours_over_theirs() -> None:
    output: Any = {"output_bytes": 1, "bits_per_weight": 4.5}
    small, large = (
        ShapeResult(
            layers=layers,
            source_bytes=8,
            page_cache_holds=True,
            ours=Measurement(seconds=[1.0, 2.0, 90.0], peak_bytes=10**8 + layers, **output),
            theirs=Measurement(seconds=[9.0, 8.0, 1.0], peak_bytes=layers * 10**9, **output),
            difference="lm_head.weight",
        )
        for layers in (1, 4)
    )
    assert describe_shape(small)[-1].endswith(
        "time 0.250, memory 0.100 (arcee_mlx / mlx_lm); weights DIFFERENT, first in lm_head.weight"
    )
    assert small.time_ratio == 2 / 8 and large.memory_ratio == (10**8 + 4) / (4 * 10**9)
    assert describe_growth(small, large).endswith(
        "from 1 to 4 layers: arcee_mlx 0.100 to 0.100 GB (x 1.00), mlx_lm 1.000 to 4.000 GB (x 4.00)"
    )


def test_a_difference_of_one_bit_is_found(measured: tuple[Path, ShapeResult], tmp_path: Path) -> None:
    shapes = measured[0]
    assert find_difference(shapes / "arcee_mlx", shapes / "mlx_lm") is None
    shutil.copytree(shapes / "arcee_mlx", tmp_path / "changed")
    entry = open_checkpoint(tmp_path / "changed").entries["model.layers.1.mlp.down_proj.scales"]
    with open(entry.file, "r+b") as file:
        file.seek(entry.end - 1)
        last = file.read(1)[0]
        file.seek(entry.end - 1)
        file.write(bytes([last ^ 1]))
    assert find_difference(tmp_path / "changed", shapes / "mlx_lm") == "model.layers.1.mlp.down_proj.scales"
    missing = {name: value for name, value in mx.load(str(shapes / "mlx_lm" / "model.safetensors")).items() if "norm" not in name}  # type: ignore[union-attr] # fmt: skip
    (tmp_path / "missing").mkdir()
    mx.save_safetensors(str(tmp_path / "missing" / "model.safetensors"), missing)
    assert find_difference(shapes / "arcee_mlx", tmp_path / "missing") == "model.layers.0.input_layernorm.weight"


def test_too_little_disk_is_refused_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**8))
    with pytest.raises(ConversionError, match=r"0\.10 GB free; expected 0\.27 GB"):
        measure_speed([1, 2], runs=1, work=tmp_path, config=TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArceeError, match=r"(?s)arcee_mlx converting .*silu"):
        measure_shape(tmp_path, 1, runs=1, config=TINY | {"hidden_act": "silu!"})
    with pytest.raises(ArceeError, match="calibrate"):
        convert_in_process("mlx_lm", tmp_path / "source", tmp_path / "out", calibrate=True)
    with pytest.raises(ArceeError, match="layout came with mlx_lm"):
        convert_in_process("mlx_lm", tmp_path / "source", tmp_path / "out", layout="by_neuron")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--layers", "0"), "--layers is 0"),
        (("--runs", "0"), "--runs is 0"),
        (("--work", "/nonexistent/folder"), "--work"),
        (("--model", "x"), "--model and --text"),
        (("--text", "x"), "--model and --text"),
        (("--calibrate",), "--calibrate, --recipe or --layout came without --model"),
        (("--layout", "by_neuron"), "--calibrate, --recipe or --layout came without --model"),
        (("--model", "x", "--text", "y", "--layers", "2"), "came with --model"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and what in error and len(error.splitlines()) == 1


def test_the_layout_is_the_one_asked_for_else_the_recipes_else_standard(
    measured: tuple[Path, ShapeResult], tmp_path: Path
) -> None:
    source = measured[0] / "source"
    cases: dict[str, tuple[str | None, str | None]] = {
        "standard": (None, "8bit"), "by_neuron": ("by_neuron", None), "by_neuron too": (None, "4bit_down8"),
    }  # fmt: skip
    for name, (layout, recipe) in cases.items():
        convert_in_process("arcee_mlx", source, tmp_path / name, layout=layout, recipe=recipe)
        assert read_config(tmp_path / name).down_proj_layout == name.split()[0]


def test_quality_end_to_end(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, numbers, work = tmp_path / "text.txt", tmp_path / "numbers.json", tmp_path / "work"
    text.write_text(TEXT, encoding="utf-8")
    work.mkdir()
    arguments = ("--model", str(checkpoint), "--text", str(text), "--work", str(work), "--json", str(numbers))
    assert main(["bench", "convert", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["arcee_mlx", "mlx_lm", "ratio"]
    assert re.match(r"ratio +KL 1\.000 \(arcee_mlx / mlx_lm\), at 5\.\d+ and 5\.\d+ bits per weight", lines[-1])
    assert list(work.iterdir()) == []
    values = json.loads(numbers.read_text())
    assert values["arcee_mlx"] == values["mlx_lm"] and values["arcee_mlx"]["kl_mean"] > 1e-4
    assert values["arcee_mlx"]["layout"] == "standard"
    assert values["machine"].keys() >= {"date", "platform", "device", "mlx", "mlx_lm"} and values["kl_ratio"] == 1
