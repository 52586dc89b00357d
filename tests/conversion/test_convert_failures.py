"""What `convert` refuses, and that a failure leaves what was there before: all or nothing."""

import json
import os

import mlx.core as mx
import pytest

from arcee_mlx import ArceeConfig, load_model
from arcee_mlx.conversion import prepare, quantize, run, work_folder
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.run import convert
from arcee_mlx.errors import CheckpointError, ConfigError, ConversionError, InputError

from conversion_data import FLOAT, SHAPE, assert_nothing_left, random_weights, write_source


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices a tensor, the last one ragged."""
    monkeypatch.setattr(quantize, "SLICE_BYTES", 12_000)


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists already"):
        convert(tmp_path / "no such source", tmp_path / "out")


def test_overwrite_replaces_a_checkpoint_and_nothing_else(tmp_path):
    source = write_source(tmp_path / "in")
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", Recipe(quantization=Quantization(bits=8)), overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["quantization"]["bits"] == 8
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"cat")
    with pytest.raises(InputError, match="no checkpoint folder"):
        convert(source, tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos/cat.jpg").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out", "photos"]


def test_overwrite_never_takes_the_place_of_the_source(tmp_path):
    source = write_source(tmp_path / "outer/in")
    (tmp_path / "outer/config.json").write_text("{}")
    for target in (source, tmp_path / "outer"):
        with pytest.raises(InputError, match="is or holds the source"):
            convert(source, target, overwrite=True)
    assert load_model(source)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there_before(tmp_path, monkeypatch, overwrite):
    """Of failures that the same command may not meet again, see test_interrupted.py."""
    source = write_source(tmp_path / "in")
    if overwrite:
        convert(source, tmp_path / "out", FLOAT)
    real, calls = quantize.read_rows, []

    def find_the_ninth_cut_off(*args):
        calls.append(args)
        if len(calls) == 9:
            raise CheckpointError("in/model.safetensors: ends inside 'x'; download it again")
        return real(*args)

    monkeypatch.setattr(work_folder, "COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr(quantize, "read_rows", find_the_ninth_cut_off)
    with pytest.raises(CheckpointError, match="ends inside"):
        convert(source, tmp_path / "out", overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["in", "out"] if overwrite else ["in"])
    if overwrite:
        assert load_model(tmp_path / "out").config.quantization is None


def test_a_truncated_source_is_refused_before_anything_is_written(tmp_path):
    source = write_source(tmp_path / "in")
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(CheckpointError, match="download it again"):
        convert(source, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = write_source(tmp_path / "in")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 123_000}))
    monkeypatch.setattr(run, "open_work_folder", lambda *_, **__: pytest.fail("started writing"))
    with pytest.raises(ConversionError, match=r"0\.00 GB free; expected 0\.02 GB"):
        convert(source, tmp_path / "deep/down/out")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_converted_checkpoint_is_not_converted_again(tmp_path):
    convert(write_source(tmp_path / "in"), tmp_path / "mid")
    with pytest.raises(ConversionError, match=r"mid/model\.safetensors: is quantized for MLX already.*the original"):
        convert(tmp_path / "mid", tmp_path / "out")
    convert(tmp_path / "in", tmp_path / "by_neuron", Recipe(quantization=None, layout="by_neuron"))
    with pytest.raises(ConversionError, match=r"by_neuron/config\.json: has down projections by neuron.*the original"):
        convert(tmp_path / "by_neuron", tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_weights_that_do_not_fit_the_config_are_refused_before_anything_is_written(tmp_path):
    source = write_source(tmp_path / "in", random_weights(ArceeConfig(**SHAPE)), intermediate_size=256)
    with pytest.raises(CheckpointError, match="has shape"):
        convert(source, tmp_path / "out")
    with pytest.raises(ConfigError, match="architectures"):
        convert(write_source(tmp_path / "in2", architecture="ArceeForSomething"), tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("recipe", [FLOAT, Recipe()], ids=["float", "4bit"])
def test_inf_and_nan_are_an_error_that_names_the_tensor(tmp_path, value, stored, recipe):
    weights = random_weights(ArceeConfig(**SHAPE))
    weights["model.layers.1.mlp.up_proj.weight"][200, 7] = value
    with pytest.raises(ConversionError, match=r"layers\.1\.mlp\.up_proj\.weight' holds Inf or NaN in rows"):
        convert(write_source(tmp_path / "in", weights, dtype=stored), tmp_path / "out", recipe)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [70000.0, -65520.0])
def test_a_value_too_large_for_float16_is_an_error_that_names_the_tensor(tmp_path, value):
    weights = random_weights(ArceeConfig(**SHAPE))
    weights["model.norm.weight"][5] = value
    source = write_source(tmp_path / "in", weights, dtype="F32")
    with pytest.raises(ConversionError, match=r"'model\.norm\.weight' holds a value too large for float16.*65504"):
        convert(source, tmp_path / "out", Recipe(dtype="float16"))
    convert(source, tmp_path / "out", Recipe(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_non_finite_values_are_found_and_finite_ones_are_not_taken_for_them(dtype):
    largest = mx.finfo(dtype).max
    assert not quantize.has_non_finite(mx.array([0.0, -0.0, largest, -largest, 1e-30]).astype(dtype))
    assert not quantize.has_non_finite(mx.zeros((0, 4), dtype))
    for value in (float("inf"), -float("inf"), float("nan"), -float("nan")):
        assert quantize.has_non_finite(mx.array([1.0, value, -1.0]).astype(dtype))


def test_what_was_written_is_read_back_and_compared_with_the_plan(tmp_path, monkeypatch):
    source = write_source(tmp_path / "in")

    def write_other_weights(work, *_, **__):
        mx.save_safetensors(str(work.model / "model.safetensors"), {"model.norm.weight": mx.ones((3,))})

    monkeypatch.setattr(run, "_write_weights", write_other_weights)
    with pytest.raises(ConversionError, match="not what was planned.*nothing was kept"):
        convert(source, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("values", [{"bits": 7}, {"group_size": 48}, {"mode": "q4"}])
def test_values_out_of_range_are_refused_by_name(values):
    with pytest.raises(InputError, match=next(iter(values))):
        Quantization(**values)
    with pytest.raises(InputError, match="dtype is 'float64'"):
        Recipe(dtype="float64")
