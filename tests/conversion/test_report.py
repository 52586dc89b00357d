"""What a conversion says of itself: conversion.json, the model card, the summary, the picture."""

import argparse
import json
import shlex
import sys
from dataclasses import replace

import mlx.core as mx
import pytest

from arcee_mlx.conversion import command, report
from arcee_mlx.conversion.card import describe_command, write_card
from arcee_mlx.conversion.picture import write_picture
from arcee_mlx.conversion.prepare import plan_conversion
from arcee_mlx.conversion.recipe_file import read_recipe
from arcee_mlx.conversion.recipes import Quantization, Recipe, Rule, list_recipes, override
from arcee_mlx.conversion.report import summarize, write_report
from arcee_mlx.conversion.texts import Sample
from arcee_mlx.measure.evaluate import Comparison, LayerError

from conversion_data import FLOAT, STANDARD, write_source

MIXED = Recipe(
    quantization=Quantization(bits=3, group_size=32),
    rules=[
        Rule(tensors=["*.v_proj", "lm_head"], quantization=Quantization(mode="mxfp8"), layers=[0, -1]),
        Rule(tensors=["*.up_proj"], quantization=None),
    ],
    dtype="float16",
    layout="by_neuron",
    description="mine: all of it",
)
DOWN = "model.layers.1.mlp.down_proj.weight_by_neuron"
SAMPLE = Sample("held_out.txt", "ab" * 32, mx.zeros((4, 256), mx.int32))
COMPARISON = Comparison(
    tokens=1020, perplexity_reference=52.96, perplexity=53.1234, kl_mean=2.4e-4, kl_p99=1.9e-3, kl_max=0.01,
    top1_agreement=0.9876, hidden_error=0.0123,
    layers=[LayerError(index=i, own=own, accumulated=0.01 * i) for i, own in enumerate([0.011, 0.033, 0.022, 0.044])],
)  # fmt: skip


@pytest.fixture
def planned(tmp_path):
    return plan_conversion(write_source(tmp_path / "original"), tmp_path / "small", Recipe())


@pytest.fixture
def conversion(planned):
    """A conversion that has run and was checked, but not compared."""
    errors = {tensor.name: 0.09 if tensor.quantization else 0.0 for tensor in planned.tensors}
    errors[DOWN] = 0.1234
    return replace(planned.conversion, errors=errors, seconds=12.34)


@pytest.fixture
def compared(conversion):
    return replace(conversion, comparison=COMPARISON, verification=SAMPLE)


def read_card(folder, conversion, source, hub_id=None):
    folder.mkdir(exist_ok=True)
    write_card(folder, conversion, source, hub_id=hub_id)
    return (folder / "README.md").read_text(encoding="utf-8")


def test_the_report_holds_what_is_known_as_json(tmp_path, planned, compared):
    write_report(tmp_path, replace(compared, revision="0123abc", calibration=SAMPLE), planned.tensors,
                 source_files={"a.safetensors": "12"}, result_files={"model.safetensors": "34"})  # fmt: skip
    values = json.loads((tmp_path / "conversion.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert values["source"] == "original" and values["revision"] == "0123abc" and values["layout"] == "by_neuron"
    assert values["source_files"] == {"a.safetensors": "12"} and values["result_files"] == {"model.safetensors": "34"}
    assert values["recipe"]["quantization"] == {"bits": 4, "group_size": 64, "mode": "affine"}
    assert values["comparison"] == COMPARISON.to_dict() | {"layers": [vars(layer) for layer in COMPARISON.layers]}
    text = {"text": "held_out.txt", "sha256": "ab" * 32, "sequences": 4, "tokens_each": 256}
    assert values["verification"] == values["calibration"] == text
    assert values["errors"][DOWN] == 0.1234
    assert values["seconds"] == 12.34 and values["peak_memory_bytes"] > 1e6
    assert values["versions"].keys() == {"arcee_mlx", "mlx", "numpy", "python"}
    four_bits = "4 bits in groups of 64"
    assert {form["form"] for form in values["forms"]} == {four_bits, f"{four_bits}, by neuron", "bfloat16"}
    assert sum(form["bytes"] for form in values["forms"]) == compared.bytes == values["bytes"]
    assert sum(form["weights"] for form in values["forms"]) == compared.weights


def test_what_was_not_done_is_null(tmp_path, planned):
    write_report(tmp_path, planned.conversion, planned.tensors, source_files={}, result_files={})
    values = json.loads((tmp_path / "conversion.json").read_text())
    assert values["comparison"] is values["verification"] is values["calibration"] is values["revision"] is None


def test_nothing_written_says_where_on_this_machine_it_was_made(tmp_path, planned, compared):
    folder = tmp_path / "small"
    card = read_card(folder, replace(compared, calibration=SAMPLE), planned.folder)
    write_report(folder, compared, planned.tensors, source_files={}, result_files={})
    for text in (card, (folder / "conversion.json").read_text()):
        assert str(tmp_path) not in text and tmp_path.name not in text
    assert str(folder) in summarize(compared)


def test_the_card_shows_how_good_it_is(tmp_path, planned, compared):
    card = read_card(tmp_path / "small", compared, planned.folder, hub_id="org/original")
    assert 'base_model: "org/original"\nbase_model_relation: "quantized"' in card
    for row in (
        "| perplexity | 52.9600 | 53.1234 |",
        "| KL divergence from the original, mean |  | 2.400e-04 nats |",
        "| its 99th percentile |  | 1.900e-03 nats |",
        "| same likeliest token |  | 98.76% |",
        "3 (4.40%), 1 (3.30%), 2 (2.20%)",
        "1,020 tokens of `held_out.txt`",
    ):
        assert row in card, row
    assert 'arcee-mlx generate --model small --prompt "' in card and 'arcee_mlx.load("small")' in card
    assert "conversion.png" not in card


def test_the_card_of_what_was_not_compared_shows_the_weights_alone(tmp_path, planned, conversion):
    card = read_card(tmp_path / "small", conversion, planned.folder)
    assert "9.00% to 12.34%" in card and "perplexity" not in card and "not compared" in card
    assert "How good" not in read_card(tmp_path / "small", planned.conversion, planned.folder)
    # Calibration moves weights on purpose: their distance says nothing.
    assert "How good" not in read_card(tmp_path / "small", replace(conversion, calibration=SAMPLE), planned.folder)


def test_the_card_of_a_decoder_without_a_head_has_no_perplexity(tmp_path, planned, compared):
    nothing = dict.fromkeys(("perplexity_reference", "perplexity", "kl_mean", "kl_p99", "kl_max", "top1_agreement"))
    headless = replace(compared, comparison=replace(COMPARISON, **nothing))
    card = read_card(tmp_path / "small", headless, planned.folder)
    assert "1.23%" in card and "perplexity" not in card and "None" not in card
    assert "hidden states off by 1.23%" in summarize(headless) and "None" not in summarize(headless)


def test_a_picture_that_is_there_is_shown(tmp_path, planned, compared):
    (tmp_path / "small").mkdir()
    (tmp_path / "small/conversion.png").write_bytes(b"")
    assert "![Errors by layer](conversion.png)" in read_card(tmp_path / "small", compared, planned.folder)


RECIPES = [read_recipe(name) for name in list_recipes()]
RECIPES += [FLOAT, Recipe(), MIXED, Recipe(quantization=Quantization(mode="nvfp4"), layout="by_neuron")]
RECIPES += [override(read_recipe("mixed_3_6"), group_size=32), override(read_recipe("4bit"), bits=8, dtype="float32")]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("calibration", [None, SAMPLE])
def test_the_command_of_a_card_makes_the_same_again(tmp_path, monkeypatch, conversion, recipe, calibration):
    made = replace(conversion, recipe=recipe, calibration=calibration, revision="v1.0")
    line, yaml = describe_command(made)
    assert line.startswith("arcee-mlx convert --hf-path original --revision v1.0 ")
    monkeypatch.chdir(tmp_path)
    if yaml:
        (tmp_path / "recipe.yaml").write_text(yaml)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args(shlex.split(line)[2:])
    assert arguments.mlx_path == "small"
    assert arguments.calibrate == (False if calibration is None else "held_out.txt")
    found = command.choose_recipe(arguments)
    for name in ("quantization", "rules", "dtype", "layout"):
        assert getattr(found, name) == getattr(recipe, name)


def test_names_that_a_shell_would_take_apart_are_quoted(tmp_path, planned, conversion):
    odd = replace(conversion, source="my model; rm -rf *", folder=tmp_path / "a 'b'")
    assert shlex.split(describe_command(odd)[0])[3] == "my model; rm -rf *"
    card = read_card(tmp_path / "a 'b'", odd, planned.folder)
    assert f"--model {shlex.quote(odd.folder.name)} " in card


def test_the_card_says_for_whom_the_layout_is(tmp_path, planned, conversion):
    card = read_card(tmp_path / "small", conversion, planned.folder)
    assert "down projections by neuron" in card and "DoRA, AWQ" in card and "`--layout standard`" in card
    standard = plan_conversion(planned.folder, tmp_path / "other", STANDARD).conversion
    card = read_card(tmp_path / "other", standard, planned.folder)
    assert "python -m arcee_mlx.lm" in card and "by neuron" not in card and "DoRA" not in card
    assert "--layout standard" in describe_command(standard)[0]


def test_the_summary_says_how_good_it_is(conversion, compared):
    assert "weights off by 9.00% to 12.34%" in summarize(conversion)
    text = summarize(compared)
    for words in ("KL 2.40e-04", "below 1.90e-03", "52.960 -> 53.123", "98.76%", "1,020 tokens", "layers 3 (4.40%), 1"):
        assert words in text
    assert "off by" not in summarize(replace(conversion, calibration=SAMPLE))


def test_the_summary_says_how_to_get_a_picture_where_there_is_none(monkeypatch, planned, conversion):
    note = "pip install 'arcee-mlx[plot]'"
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    assert note in summarize(conversion) and note not in summarize(planned.conversion)
    monkeypatch.setattr(report, "find_spec", lambda name: object())
    assert note not in summarize(conversion)


@pytest.mark.parametrize("comparison", [COMPARISON, replace(COMPARISON, kl_mean=None), None])
def test_the_picture_is_a_png_of_readable_size_with_two_panels(tmp_path, monkeypatch, conversion, comparison):
    figures = pytest.importorskip("matplotlib.figure")
    monkeypatch.setenv("DISPLAY", "")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    drawn = []
    save = figures.Figure.savefig
    monkeypatch.setattr(figures.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k)))
    path = write_picture(tmp_path, conversion.errors, comparison)
    assert path == tmp_path / "conversion.png"
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[start : start + 4], "big") for start in (16, 20))
    assert width > 1200 and height > 400
    left, right = drawn[0].axes
    lines = {line.get_label(): list(line.get_ydata()) for line in left.lines}
    assert lines["down_proj"] == pytest.approx([9, 12.34]) and len(lines) == 6
    heights = [bar.get_height() if comparison else bar.get_width() for bar in right.patches]
    assert heights == pytest.approx([1.1, 3.3, 2.2, 4.4] if comparison else [9, 9, 9, 9, 9, 9, 9, 10.67])
    assert ("KL" in right.get_title()) == (comparison is COMPARISON)
    assert "matplotlib.pyplot" not in sys.modules


def test_there_is_no_picture_of_nothing_or_without_matplotlib(tmp_path, monkeypatch, planned, conversion):
    assert write_picture(tmp_path, dict.fromkeys(conversion.errors, 0.0)) is None
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write_picture(tmp_path, conversion.errors, COMPARISON) is None
    assert not list(tmp_path.glob("*.png"))
