"""A dry run: every tensor with form and size, totals that are the conversion's own, notes, and nothing written."""

import json

import pytest

from arcee_mlx import cli
from arcee_mlx.conversion import dry_run, prepare
from arcee_mlx.conversion.dry_run import describe_plan, estimate_calibration_memory, estimate_memory, plan_to_dict
from arcee_mlx.conversion.prepare import plan_conversion
from arcee_mlx.conversion.quantize import SLICE_BYTES
from arcee_mlx.conversion.recipe_file import read_recipe, recipe_from_dict
from arcee_mlx.conversion.recipes import Recipe, Rule
from arcee_mlx.conversion.run import convert

from conversion_data import in_standard_layout, write_source


def dry_run_command(*arguments):
    return cli.main(["convert", *map(str, arguments), "--dry-run"])


def test_every_tensor_has_a_line_with_shape_form_and_size_and_the_totals_are_the_conversions(tmp_path):
    source = write_source(tmp_path / "in", num_hidden_layers=11)
    recipe = in_standard_layout("mixed_3_6")
    planned = plan_conversion(source, tmp_path / "out", recipe)
    lines = describe_plan(planned).splitlines()
    rows = {line.split()[0]: line for line in lines[1 : lines.index("")]}
    assert set(rows) == {tensor.name for tensor in planned.tensors}
    assert rows["lm_head.weight"].split(None, 1)[1].split("  ") == ["133 x 128", "6 bits in groups of 64", "0.014"]
    assert "3 bits in groups of 64" in rows["model.layers.1.mlp.down_proj.weight"]
    assert "6 bits in groups of 64" in rows["model.layers.10.mlp.down_proj.weight"]
    layers = [int(name.split(".")[2]) for name in rows if ".layers." in name]
    assert layers == sorted(layers)
    conversion = convert(source, tmp_path / "out", recipe)
    total, memory, disk = lines[lines.index("") + 1 :]
    assert f"{len(planned.tensors)} tensors" in total and f"{conversion.bits_per_weight:.3f} bits per weight" in total
    assert f"{conversion.bytes / 1e6:.2f} MB" in total
    assert memory.startswith("memory  about") and f"{planned.needed_bytes / 1e6:.2f} MB needed" in disk


def test_folding_joins_runs_of_equal_layers_and_keeps_the_sum(tmp_path):
    source = write_source(tmp_path / "in", num_hidden_layers=12)
    rules = [Rule(tensors=["*.up_proj"], layers=[3, 11], quantization=None)]
    planned = plan_conversion(source, tmp_path / "out", Recipe(rules=rules))
    lines = describe_plan(planned, fold_layers=True).splitlines()
    rows = [line.split() for line in lines[1 : lines.index("")]]
    ups = {row[0]: float(row[-1]) for row in rows if "up_proj" in row[0]}
    assert list(ups) == [f"model.layers.{run}.mlp.up_proj.weight" for run in ("0-2", "3", "4-10", "11")]
    one = next(tensor.nbytes for tensor in planned.tensors if tensor.name == "model.layers.0.mlp.up_proj.weight") / 1e6
    assert ups["model.layers.0-2.mlp.up_proj.weight"] == pytest.approx(3 * one, abs=1e-3)
    assert sum(float(row[-1]) for row in rows) == pytest.approx(planned.conversion.bytes / 1e6, abs=0.05)


def test_notes_name_idle_rules_and_layers_that_stay_floats_against_the_recipe(tmp_path):
    source = write_source(tmp_path / "in", intermediate_size=200)
    recipe = Recipe(rules=[Rule(tensors=["*.gate_proj"], quantization=None)], layout="standard")
    text = describe_plan(plan_conversion(source, tmp_path / "out", recipe))
    assert "note    rules[0]: '*.gate_proj' matches no layer of this model" in text
    assert "note    rows of model.layers.0.mlp.down_proj and 1 more do not divide into groups" in text
    assert "note" not in describe_plan(plan_conversion(write_source(tmp_path / "in2"), tmp_path / "out", Recipe()))


def test_the_command_prints_the_plan_and_writes_nothing(tmp_path, capsys):
    source = write_source(tmp_path / "in")
    arguments = ["--hf-path", source, "--mlx-path", tmp_path / "out", "--recipe", "4bit_down8"]
    assert dry_run_command(*arguments) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("model.layers.1.mlp.down_proj"))
    assert row.split(None, 1)[0].endswith(".weight_by_neuron")
    assert "384 x 128  8 bits in groups of 64, by neuron" in row
    assert dry_run_command(*arguments, "--json") == 0
    values = json.loads(capsys.readouterr().out)
    planned = plan_conversion(source, tmp_path / "out", read_recipe("4bit_down8"))
    assert values == json.loads(json.dumps(plan_to_dict(planned) | {"free_bytes": values["free_bytes"]}))
    assert recipe_from_dict(values["recipe"]) == read_recipe("4bit_down8")
    assert sum(tensor["bytes"] for tensor in values["tensors"]) == values["bytes"] == planned.conversion.bytes
    assert values["quantization"]["model.layers.0.mlp.down_proj"]["bits"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("options", "activation", "layout"),
    [
        ([], "relu2", "by_neuron"),
        (["--layout", "standard"], "relu2", "standard"),
        (["--no-quantize"], "relu2", "standard"),
        ([], "silu", "standard"),
    ],
)
def test_the_layout_that_was_chosen_is_said(tmp_path, capsys, options, activation, layout):
    source = write_source(tmp_path / "in", hidden_act=activation)
    arguments = ["--hf-path", source, "--mlx-path", tmp_path / "out", *options]
    assert dry_run_command(*arguments) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if ".mlp.down_proj." in line]
    assert len(rows) == 2 and all(("by neuron" in row) == (layout == "by_neuron") for row in rows)
    assert dry_run_command(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layout"] == layout


def test_a_disk_that_is_too_small_is_said_after_the_plan(tmp_path, capsys, monkeypatch):
    source = write_source(tmp_path / "in")
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 123_000}))
    assert dry_run_command("--hf-path", source, "--mlx-path", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert "0.12 MB free" in out and "has 0.00 GB free; expected 0.02 GB" in err


def test_an_option_of_the_dry_run_is_not_ignored_without_it(tmp_path, capsys):
    assert cli.main(["convert", "--hf-path", str(tmp_path), "--mlx-path", str(tmp_path / "out"), "--fold-layers"]) == 2
    assert "--fold-layers came without --dry-run" in capsys.readouterr().err


def test_a_dry_run_refuses_what_the_conversion_would(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert dry_run_command("--hf-path", write_source(tmp_path / "in"), "--mlx-path", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err


def test_memory_grows_with_a_tensor_up_to_a_slice_only(tmp_path, monkeypatch):
    planned = plan_conversion(write_source(tmp_path / "in"), tmp_path / "out")
    largest = max(tensor.source.nbytes for tensor in planned.tensors)
    whole = estimate_memory(planned.tensors)
    assert largest < SLICE_BYTES and whole > 2 * largest
    monkeypatch.setattr(dry_run, "SLICE_BYTES", largest / 2)
    assert estimate_memory(planned.tensors) < whole


def test_memory_for_calibration_counts_layer_text_and_the_widest_moments(tmp_path):
    planned = plan_conversion(write_source(tmp_path / "in"), tmp_path / "out")
    few, many = (estimate_calibration_memory(planned.tensors, tokens) for tokens in (1000, 3000))
    assert many - few == 4 * 2000 * 128 * 4  # two streams of hidden states, old and new, in float32
    layer = sum(t.weights for t in planned.tensors if t.key.startswith("model.layers.0."))
    assert few - 4 * 1000 * 128 * 4 > 8 * layer + 4 * 8 * 384**2
    text = describe_plan(planned, calibration_tokens=1000)
    assert f"about {few / 1e6:,.0f} MB needed" in text
    assert plan_to_dict(planned, calibration_tokens=1000)["memory_bytes"] == few
