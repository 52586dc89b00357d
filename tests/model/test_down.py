"""The down projection by neuron: nn.Linear's numbers, its files, and what is said where it has no place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import arcee_mlx
import arcee_mlx.lm  # makes the model known to mlx-lm
from arcee_mlx import ArceeConfig, ArceeForCausalLM, inspect_checkpoint, load_model, save_checkpoint, set_adapter
from arcee_mlx.errors import CheckpointError, ConfigError
from arcee_mlx.inspection.command import describe
from arcee_mlx.model.relu2.down import DownByNeuron, QuantizedDownByNeuron
from arcee_mlx.upstream import mlx_lm_module

from adapter_data import adapted, write_mlx_lm, write_peft
from checkpoint_changes import change_json
from conftest import flat, tiny_config, write_tokenizer

F, E = 128, 64
IDS = mx.array([[5, 6, 7, 300, 8]])
DOWN = "model.layers.0.mlp.down_proj"
LAYOUT = {"name": "by_neuron", "version": 1}
FORMS = [
    *({"group_size": 32, "bits": bits, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8)),
    {"group_size": 64, "bits": 4, "mode": "affine"},
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
]


def transposed(linear: nn.Linear) -> DownByNeuron:
    down = DownByNeuron(F, E, bias="bias" in linear)
    down.weight_by_neuron = mx.contiguous(linear.weight.T)
    if "bias" in linear:
        down.bias = linear.bias
    return down


def make_models(bits: int = 0, **changes: Any) -> tuple[ArceeForCausalLM, ArceeForCausalLM]:
    """A random model, and the same with its down projections by neuron; `bits` other than 0 quantizes the second."""
    mx.random.seed(2)
    model = ArceeForCausalLM(tiny_config(**changes))
    weights = [(name, 0.3 * mx.random.normal(value.shape)) for name, value in flat(model)]
    model.load_weights(weights)
    own = ArceeForCausalLM(tiny_config(down_proj_layout="by_neuron", **changes))
    suffix = ".down_proj.weight"
    own.load_weights([(n + "_by_neuron", w.T) if n.endswith(suffix) else (n, w) for n, w in weights])
    if bits:
        nn.quantize(own, 32, bits)
    return model.eval(), own.eval()


@pytest.fixture(scope="module", params=[0, 4], ids=["float", "4bit"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint by neuron with its tokenizer; read only."""
    path = tmp_path_factory.mktemp("down") / "model"
    save_checkpoint(make_models(request.param, mlp_bias=True)[1], path)
    write_tokenizer(path)
    return path


# The layer


@pytest.mark.parametrize("bias", [False, True])
def test_it_is_the_linear_layer_of_the_transposed_weight(bias: bool) -> None:
    linear = nn.Linear(F, E, bias=bias)
    x = mx.random.normal((2, 3, F))
    assert mx.allclose(transposed(linear)(x), linear(x), atol=1e-5).item()
    assert transposed(linear)(x).shape == (2, 3, E)
    assert {name: value.shape for name, value in tree_flatten(DownByNeuron(F, E, bias=bias).parameters())} == (
        {"weight_by_neuron": (F, E)} | ({"bias": (E,)} if bias else {})
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['mode']}-{form['bits']}-{form['group_size']}")
def test_every_form_packs_each_neurons_row_as_mlx_does(form: dict[str, Any], bias: bool) -> None:
    linear = nn.Linear(F, E, bias=bias)
    layer = transposed(linear).to_quantized(**form)
    assert isinstance(layer, QuantizedDownByNeuron)
    expected = mx.quantize(linear.weight.T, **form)
    found = [layer.weight_by_neuron, layer.scales, *([layer.biases] if "biases" in layer else [])]
    assert len(found) == len(expected) and all(
        mx.array_equal(a, b).item() for a, b in zip(found, expected, strict=True)
    )
    x = mx.random.normal((2, 3, F))
    product = x @ mx.dequantize(*expected, **form).astype(mx.float32)
    if bias:
        product = product + linear.bias
    assert mx.allclose(layer(x), product, atol=1e-4).item()
    assert (layer.group_size, layer.bits, layer.mode) == (form["group_size"], form["bits"], form["mode"])


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4", "mxfp8"])
def test_a_form_that_is_not_named_is_the_modes_own(mode: str) -> None:
    linear, layer = nn.Linear(F, E).to_quantized(mode=mode), DownByNeuron(F, E).to_quantized(mode=mode)
    assert (layer.group_size, layer.bits, layer.mode) == (linear.group_size, linear.bits, linear.mode)


def test_packed_weights_cannot_be_trained() -> None:
    layer = DownByNeuron(F, E, bias=True).to_quantized(32, 4)
    layer.unfreeze()
    assert not tree_flatten(layer.trainable_parameters())
    assert tree_flatten(DownByNeuron(F, E).trainable_parameters())


# Its files


@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("mlp_bias", [False, True])
def test_a_saved_model_loads_as_the_same_model(tmp_path: Path, bits: int, mlp_bias: bool) -> None:
    standard, model = make_models(bits, mlp_bias=mlp_bias)
    save_checkpoint(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config.down_proj_layout == "by_neuron"
    assert isinstance(loaded.layers[0].mlp.down_proj, QuantizedDownByNeuron if bits else DownByNeuron)
    expected, found = dict(flat(model)), dict(flat(loaded))
    assert expected.keys() == found.keys() and f"{DOWN}.weight_by_neuron" in found and f"{DOWN}.weight" not in found
    assert all(mx.array_equal(found[name], value).item() for name, value in expected.items())
    assert mx.array_equal(loaded(IDS), model(IDS)).item()
    if not bits:
        assert mx.allclose(loaded(IDS), standard(IDS), atol=1e-4).item()


def test_config_json_holds_the_layout_and_its_version(tmp_path: Path) -> None:
    standard, model = make_models()
    save_checkpoint(model, tmp_path / "own")
    save_checkpoint(standard, tmp_path / "standard")
    assert json.loads((tmp_path / "own" / "config.json").read_text())["down_proj_layout"] == LAYOUT
    assert "down_proj_layout" not in json.loads((tmp_path / "standard" / "config.json").read_text())


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_a_config_comes_back_from_its_json(layout: str) -> None:
    config = tiny_config(down_proj_layout=layout)
    assert ArceeConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "by_neuron", "version": 2},
        {"name": "by_column", "version": 1},
        {"name": "by_neuron"},
        {},
        "by_neuron",
        ["by_neuron", 1],
        1,
    ],
    ids=str,
)
def test_a_layout_or_version_from_elsewhere_is_refused(folder: Path, tmp_path: Path, entry: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"down_proj_layout": entry}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config\.json: down_proj_layout is .*; expected .*'version': 1.*; upgrade"):
        load_model(tmp_path)


def test_a_layout_of_no_name_is_refused_in_python_too() -> None:
    with pytest.raises(ConfigError, match="down_proj_layout is 'by_column'; expected standard or by_neuron"):
        tiny_config(down_proj_layout="by_column")


def test_a_loader_that_does_not_know_it_stops_at_its_name(folder: Path, tmp_path: Path) -> None:
    """Without the entry in config.json this package is such a loader; `load_weights` of any MLX model is another."""
    copied = copy_without_layout(folder, tmp_path / "model")
    with pytest.raises(CheckpointError, match=rf"no tensor '{DOWN}\.weight'.*holds '{DOWN}\.weight_by_neuron'"):
        load_model(copied)
    standard = make_models(mlp_bias=True)[0]
    with pytest.raises(ValueError, match="weight_by_neuron"):
        standard.load_weights(str(folder / "model.safetensors"), strict=True)


def copy_without_layout(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    change_json(target / "config.json", "down_proj_layout")
    return target


def test_inspect_counts_and_names_it(folder: Path) -> None:
    inspection = inspect_checkpoint(folder)
    assert inspection.loads and not inspection.findings and inspection.weights is not None
    standard = make_models(mlp_bias=True)[0]
    assert inspection.weights.total.parameters == sum(value.size for _, value in flat(standard))
    quantized = "4 bits in groups of 32"
    expected = (
        {quantized, "F32"} if any(".scales" in name for name in mx.load(str(folder / "model.safetensors"))) else {"F32"}
    )
    assert set(inspection.weights.forms) == set(inspection.weights.part_forms["mlp"]) == expected
    assert "quantized" not in inspection.weights.forms
    assert "down projections by neuron" in " ".join(describe(inspection).split())


# Elsewhere


def test_mlx_lm_loads_it_through_arcee_mlx_and_generates_the_same(folder: Path) -> None:
    model, tokenizer = mlx_lm_module("utils").load(str(folder))
    own, own_tokenizer = arcee_mlx.load(folder)
    assert mx.array_equal(model(IDS), own(IDS)).item()
    steps = mlx_lm_module("generate").stream_generate(model, tokenizer, prompt="Call me", max_tokens=6)
    options = arcee_mlx.GenerateOptions(max_tokens=6, temp=0)
    text = "".join(part.text for part in arcee_mlx.stream_generate(own, own_tokenizer, "Call me", options))
    assert "".join(step.text for step in steps) == text and text


def test_adapters_on_other_layers_work(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    before = model(IDS)
    keys = ["self_attn.q_proj", "mlp.up_proj"]
    set_adapter(model, write_mlx_lm(tmp_path / "lora", keys=keys, mlp_bias=True))
    assert len(adapted(model)) == 4 and not mx.allclose(model(IDS), before, atol=1e-3).item()
    q = "model.layers.0.self_attn.q_proj"
    shapes = {f"{q}.lora_A.weight": (4, 64), f"{q}.lora_B.weight": (128, 4)}
    set_adapter(model, write_peft(tmp_path / "peft", shapes, target_modules=[q]))
    assert adapted(model) == [q]
    set_adapter(model, None)
    assert mx.array_equal(model(IDS), before).item()
