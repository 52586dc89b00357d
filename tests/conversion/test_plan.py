"""The plan: what becomes of each tensor, config.json's table of it, and that the result loads, here and in mlx-lm."""

import json
import re
from dataclasses import asdict, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import arcee_mlx.lm  # noqa: F401 - makes arcee known to mlx-lm
from arcee_mlx import ArceeConfig, ArceeModel, load_model
from arcee_mlx.checkpoint.files import open_checkpoint
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.checkpoint.quantization import Quantization
from arcee_mlx.conversion.plan import (
    PlannedTensor,
    describe_form,
    find_idle_rules,
    find_undivided,
    plan_tensors,
    quantization_table,
)
from arcee_mlx.conversion.recipe_file import read_recipe
from arcee_mlx.conversion.recipes import Recipe, Rule
from arcee_mlx.conversion.run import convert
from arcee_mlx.upstream import mlx_lm_module

from conversion_data import (
    FLOAT,
    IDS,
    SHAPE,
    STANDARD,
    assert_same_bits,
    in_standard_layout,
    random_weights,
    read_weights,
    write_source,
)

MIXED = Recipe(
    layout="standard",
    quantization=Quantization(bits=3),
    rules=[
        Rule(tensors=["*.v_proj"], quantization=None),
        Rule(tensors=["*.mlp.*"], layers=[-1], quantization=Quantization(bits=8, group_size=32)),
        Rule(tensors=["lm_head"], quantization=Quantization(mode="mxfp8")),
    ],
)


def make_plan(folder, recipe, dtype="bfloat16"):
    opened = open_model(folder)
    sources = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
    layers = {path for path, module in opened.model.named_modules() if hasattr(module, "to_quantized")}
    layout = recipe.choose_layout(opened.config.hidden_act)
    return plan_tensors(sources, layers, recipe, dtype=dtype, layout=layout, num_layers=opened.config.num_hidden_layers)


def quantized_in_memory(source, recipe, num_layers=2):
    """The model that nn.quantize makes by the same choice."""
    model = load_model(source, dtype="auto")

    def choose(path, module):
        form = recipe.choose(path, num_layers)[1] if hasattr(module, "to_quantized") else None
        return form is not None and module.weight.shape[-1] % form.group_size == 0 and asdict(form)

    nn.quantize(model, class_predicate=choose)
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("plan") / "in")


RECIPES = ["2bit", "3bit", "5bit", "6bit", "8bit", "mxfp4", "nvfp4", "mxfp8", "mixed_3_6", "arcee_3_4", "arcee_4_5"]


@pytest.mark.parametrize(
    "recipe", [MIXED, *map(in_standard_layout, RECIPES)], ids=lambda recipe: recipe.name or "mixed"
)
def test_a_conversion_has_the_bits_of_nn_quantize_and_loads_as_the_same_model(tmp_path, source, recipe):
    convert(source, tmp_path / "out", recipe)
    expected = quantized_in_memory(source, recipe)
    assert_same_bits(read_weights(tmp_path / "out"), dict(tree_flatten(expected.parameters())))
    expected.set_dtype(mx.float32)
    logits = load_model(tmp_path / "out")(IDS)
    assert mx.isfinite(logits).all()
    np.testing.assert_allclose(logits, expected(IDS), atol=2e-5)


@pytest.mark.parametrize(("mode", "most"), [("affine", 0.3), ("mxfp4", 0.5), ("nvfp4", 0.4), ("mxfp8", 0.12)])
def test_a_model_in_each_mode_is_close_to_the_float_model(tmp_path, source, mode, most):
    convert(source, tmp_path / "out", Recipe(quantization=Quantization(mode=mode)))
    expected = load_model(source)(IDS)
    error = mx.linalg.norm(load_model(tmp_path / "out")(IDS) - expected) / mx.linalg.norm(expected)
    assert 0 < error.item() < most


@pytest.mark.parametrize(
    "recipe", [MIXED, *map(read_recipe, ["mxfp4", "mixed_3_6", "arcee_4_5"])], ids=lambda r: r.name
)
def test_mlx_lm_loads_a_conversion_as_this_package_does(tmp_path, source, recipe):
    convert(source, tmp_path / "out", recipe)
    theirs, _ = mlx_lm_module("utils").load_model(tmp_path / "out")
    np.testing.assert_allclose(theirs(IDS), load_model(tmp_path / "out")(IDS), atol=1e-6)


def test_the_table_has_a_default_and_an_entry_for_each_layer_that_differs(tmp_path, source):
    table = quantization_table(make_plan(source, MIXED))
    wide = {"group_size": 32, "bits": 8, "mode": "affine"}
    assert table == {
        "group_size": 64, "bits": 3, "mode": "affine",
        "lm_head": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        "model.layers.0.self_attn.v_proj": False, "model.layers.1.self_attn.v_proj": False,
        "model.layers.1.mlp.down_proj": wide, "model.layers.1.mlp.up_proj": wide,
    }  # fmt: skip
    convert(source, tmp_path / "out", MIXED)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == table


def test_a_conversion_in_which_nothing_is_quantized_has_no_table(tmp_path):
    source = write_source(tmp_path / "in", hidden_size=36, intermediate_size=72, head_dim=18)
    convert(source, tmp_path / "out")
    assert "quantization" not in json.loads((tmp_path / "out/config.json").read_text())
    assert load_model(tmp_path / "out").config.quantization is None


def test_what_mlx_lms_own_mixed_conversion_writes_loads_here(tmp_path, source):
    # Its command without --q-group-size puts "group_size": null into every entry.
    recipe = in_standard_layout("mixed_3_6")
    convert(source, tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out/config.json").read_text())
    entries = {t.layer: asdict(t.quantization) | {"group_size": None} for t in make_plan(source, recipe) if t.layer}
    config["quantization"] = config["quantization_config"] = asdict(Quantization()) | entries
    expected = load_model(tmp_path / "out")(IDS)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    assert mx.array_equal(load_model(tmp_path / "out")(IDS), expected)


def test_a_base_model_is_planned_by_the_same_rules(tmp_path, source):
    weights = random_weights(ArceeConfig(**SHAPE), ArceeModel)
    base = write_source(tmp_path / "in", weights, architecture="ArceeModel")
    rules = [
        Rule(tensors=["model.layers.*.mlp.*"], layers=[0], quantization=Quantization(bits=2)),
        Rule(tensors=["model.embed_tokens"], quantization=None),
    ]
    recipe = Recipe(rules=rules)
    causal = {t.layer: t.quantization for t in make_plan(source, recipe) if t.layer != "lm_head"}
    assert {f"model.{t.layer}" if t.layer else None: t.quantization for t in make_plan(base, recipe)} == causal
    assert causal["model.embed_tokens"] is None and causal["model.layers.0.mlp.up_proj"].bits == 2
    convert(base, tmp_path / "out", recipe)
    assert isinstance(load_model(tmp_path / "out"), ArceeModel)


@pytest.mark.parametrize("form", [None, Quantization(bits=8), Quantization(mode="mxfp4")], ids=str)
def test_down_projections_by_neuron_are_planned_transposed(tmp_path, form):
    source = write_source(tmp_path / "in", mlp_bias=True)
    plan = {tensor.name: tensor for tensor in make_plan(source, Recipe(quantization=form, layout="by_neuron"))}
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.down_proj"
        down = plan[f"{path}.weight_by_neuron"]
        matrix = mx.zeros(down.source.shape, mx.bfloat16).T
        arrays = [matrix] if form is None else mx.quantize(matrix, **asdict(form))
        assert (down.source.shape, down.shape, down.layer, down.by_neuron) == ((128, 384), (384, 128), path, True)
        assert [shape for _, shape in down.outputs.values()] == [array.shape for array in arrays]
        names = ["weight_by_neuron", "scales", "biases"][: len(arrays)]
        assert list(down.outputs) == [f"{path}.{name}" for name in names]
        assert plan[f"{path}.bias"].outputs == {f"{path}.bias": ("BF16", (128,))}
        assert f"{path}.weight" not in plan
    standard = {tensor.name: tensor for tensor in make_plan(source, Recipe(quantization=form, layout="standard"))}
    others = {name for name in plan if "weight_by_neuron" not in name}
    assert {name: plan[name] for name in others} == {name: standard[name] for name in others}
    assert not any(tensor.by_neuron for tensor in standard.values())


def test_rows_must_divide_into_groups_in_the_layout_they_are_stored_in(tmp_path):
    source = write_source(
        tmp_path / "in", hidden_size=96, intermediate_size=320, num_attention_heads=3, num_key_value_heads=1
    )

    def undivided(layout):
        recipe = Recipe(layout=layout)
        return {layer.split(".")[-1] for layer in find_undivided(make_plan(source, recipe), recipe)}

    rows_of_96 = {"embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj"}
    assert undivided("standard") == rows_of_96
    assert undivided("by_neuron") == rows_of_96 | {"down_proj"}


def test_layers_that_a_rule_keeps_floats_are_not_called_undivided(source):
    assert find_undivided(make_plan(source, MIXED), MIXED) == []
    assert find_undivided(make_plan(source, FLOAT), FLOAT) == []


def test_the_plan_says_which_rule_decided(source):
    rules = {tensor.name: tensor.rule for tensor in make_plan(source, MIXED)}
    assert rules["model.layers.1.self_attn.v_proj.weight"] == 0 and rules["model.layers.1.mlp.up_proj.weight"] == 1
    assert rules["model.layers.0.mlp.up_proj.weight"] is None and rules["model.norm.weight"] is None


def test_the_plan_is_in_the_order_of_the_files(tmp_path):
    source = write_source(tmp_path / "in", shards=3)
    places = [(tensor.source.file, tensor.source.start) for tensor in make_plan(source, MIXED)]
    assert places == sorted(places) and len({file for file, _ in places}) == 3


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_bytes_and_weights_are_those_of_the_result(tmp_path, source, dtype):
    recipe = replace(MIXED, dtype=dtype)
    plan = make_plan(source, recipe)
    convert(source, tmp_path / "out", recipe)
    assert sum(tensor.nbytes for tensor in plan) == sum(
        array.nbytes for array in read_weights(tmp_path / "out").values()
    )
    assert sum(tensor.weights for tensor in plan) == sum(
        e.nbytes // 2 for e in open_checkpoint(source).entries.values()
    )
    assert describe_form(plan).endswith(f", {dtype}")


def test_forms_are_told_in_words_the_largest_first(source):
    assert describe_form(make_plan(source, FLOAT)) == "bfloat16"
    assert describe_form(make_plan(source, STANDARD)) == "4 bits in groups of 64, bfloat16"
    assert describe_form(make_plan(source, Recipe())) == "4 bits in groups of 64, bfloat16, down projections by neuron"
    assert describe_form(make_plan(source, read_recipe("4bit_down8"))) == (
        "4 bits in groups of 64 and 8 bits in groups of 64, bfloat16, down projections by neuron"
    )


@pytest.mark.parametrize(
    ("rules", "notes"),
    [
        ([Rule(tensors=["*.gate_proj", "*.q_proj"], quantization=None)], [r"rules\[0\]: '\*\.gate_proj' matches no layer"]),
        ([Rule(tensors=["model.norm"], quantization=None)], [r"rules\[0\]: 'model\.norm' matches no layer"]),
        ([Rule(tensors=["*.q_proj"], layers=[2], quantization=None)], [r"rules\[0\] decides no layer"]),
        (
            [Rule(tensors=["*"], quantization=None), Rule(tensors=["lm_head"], quantization=Quantization())],
            [r"rules\[1\] decides no layer"],
        ),
        ([Rule(tensors=["*.q_proj"], layers=[-1], quantization=Quantization())], []),
    ],
)  # fmt: skip
def test_what_a_recipe_says_in_vain_is_named(source, rules, notes):
    recipe = Recipe(rules=rules)
    found = find_idle_rules(make_plan(source, recipe), recipe)
    assert len(found) == len(notes)
    for text, pattern in zip(found, notes, strict=True):
        assert re.match(pattern, text)


def test_a_tensor_is_compared_by_value(source):
    first, second = make_plan(source, MIXED), make_plan(source, MIXED)
    assert first == second and all(isinstance(tensor, PlannedTensor) for tensor in first)
