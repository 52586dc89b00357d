"""mlx-lm and down projections stored by neuron: what it loads and does, and what is refused by name before it begins."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import arcee_mlx
from arcee_mlx import DEMO_MODEL
from arcee_mlx.errors import InputError
from arcee_mlx.lm import awq
from arcee_mlx.lm.command import main
from arcee_mlx.model.relu2.down import ByNeuron, DownByNeuron, QuantizedDownByNeuron, store_by_neuron
from arcee_mlx.upstream import mlx_lm_module

from conftest import write_checkpoint, write_tokenizer

IDS = mx.array([[5, 6, 7, 300, 8]])


@pytest.fixture(scope="module")
def by_neuron(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("by_neuron")
    model = write_checkpoint(folder / "standard")
    store_by_neuron(model)
    nn.quantize(model, group_size=32, bits=8)
    arcee_mlx.save_checkpoint(model, folder / "model")
    write_tokenizer(folder / "model")
    return str(folder / "model")


def test_mlx_lm_loads_the_layout_and_computes_the_same(by_neuron: str) -> None:
    theirs, _ = mlx_lm_module("utils").load(by_neuron)
    assert isinstance(theirs.layers[0].mlp.down_proj, ByNeuron)
    assert mx.array_equal(theirs(IDS), arcee_mlx.load_model(by_neuron)(IDS))


def test_mlx_lm_counts_the_weights_of_the_float_model(by_neuron: str) -> None:
    utils = mlx_lm_module("utils")
    packed, _ = utils.load(by_neuron)
    standard, _ = utils.load(str(Path(by_neuron).parent / "standard"))
    assert utils.get_total_parameters(packed) == utils.get_total_parameters(standard)


def test_mlx_lm_quantizes_a_float_model_in_the_layout(by_neuron: str, tmp_path: Path) -> None:
    model = arcee_mlx.load_model(Path(by_neuron).parent / "standard")
    store_by_neuron(model)
    arcee_mlx.save_checkpoint(model, tmp_path / "float")
    write_tokenizer(tmp_path / "float")
    convert = ["convert", "--hf-path", str(tmp_path / "float"), "--mlx-path", str(tmp_path / "packed"), "-q"]
    assert main([*convert, "--q-bits", "8", "--q-group-size", "32"]) == 0
    ours, expected = arcee_mlx.load_model(tmp_path / "packed"), arcee_mlx.load_model(by_neuron)
    assert isinstance(ours.layers[0].mlp.down_proj, QuantizedDownByNeuron)
    assert mx.array_equal(ours(IDS), expected(IDS))


def test_mlx_lm_dequantizes_to_the_standard_layout(by_neuron: str, tmp_path: Path) -> None:
    assert main(["convert", "-d", "--hf-path", by_neuron, "--mlx-path", str(tmp_path / "float")]) == 0
    ours, packed = arcee_mlx.load_model(tmp_path / "float"), arcee_mlx.load_model(by_neuron)
    assert type(ours.layers[0].mlp.down_proj) is nn.Linear and ours.config.down_proj_layout == "standard"
    assert not ours.config.quantization and mx.abs(ours(IDS) - packed(IDS)).max().item() < 1e-5


def test_what_mlx_lm_sees_as_weight_cannot_be_overwritten() -> None:
    layer = DownByNeuron(64, 32)
    assert layer.weight is layer.weight_by_neuron and "weight" not in layer.parameters()
    with pytest.raises(AttributeError):
        layer.weight = mx.zeros((32, 64))


@pytest.mark.parametrize(
    "arguments",
    [
        ["awq", "--model"],
        ["gptq", "--model"],
        ["dwq", "-m"],
        ["dynamic_quant", "--model"],
        ["lora", "--train", "--fine-tune-type", "dora", "--model"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_what_knows_nn_linear_alone_is_refused_with_the_command_that_helps(
    by_neuron: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("arcee_mlx.lm.command.find_spec", lambda name: True)
    assert main([*arguments, by_neuron]) == 2
    error = capsys.readouterr().err
    assert f"error: {arguments[0]}" in error and by_neuron in error
    assert "stored by neuron" in error and "arcee-mlx convert --layout standard" in error


def test_dora_in_a_yaml_file_is_refused_too(by_neuron: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lora.yaml").write_text(f"fine_tune_type: dora\nmodel: {by_neuron}\n")
    assert main(["lora", "--train", "-c", str(tmp_path / "lora.yaml")]) == 2
    assert "stored by neuron" in capsys.readouterr().err


def test_full_training_of_quantized_weights_is_refused_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora.yaml").write_text(f"fine_tune_type: full\nmodel: {DEMO_MODEL}\n")
    for arguments in (["--fine-tune-type", "full", "--model", str(DEMO_MODEL)], ["-c", str(tmp_path / "lora.yaml")]):
        assert main(["lora", "--train", "--data", "nowhere", *arguments]) == 2
        error = capsys.readouterr().err
        assert "quantized" in error and "convert -d" in error and "--fine-tune-type lora" in error


def test_awq_called_from_python_is_refused_too(by_neuron: str) -> None:
    model, _ = mlx_lm_module("utils").load(by_neuron)
    awq.register()
    with pytest.raises(InputError, match="awq on .* stored by neuron"):
        mlx_lm_module("quant.awq").awq_quantize(model, IDS, None)
