"""`arcee-mlx eval`: the table, the JSON, a reference, lm-eval's tasks, and what it refuses."""

import json
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import arcee_mlx
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.checkpoint.tokenizer import read_tokenizer
from arcee_mlx.cli import main
from arcee_mlx.lm import command as lm_command
from arcee_mlx.measure.evaluate import compare
from arcee_mlx.measure.perplexity import measure_perplexity
from arcee_mlx.measure.text import cut_windows
from arcee_mlx.model.relu2.down import store_by_neuron

from adapter_data import EVERYWHERE, make_base, write_mlx_lm
from conftest import TEXT, write_checkpoint, write_tokenizer


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return file


@pytest.fixture
def evaluate(checkpoint, text):
    return lambda *arguments: main(
        ["eval", str(checkpoint), "--text", str(text), "--sequence-length", "16", *arguments]
    )


@pytest.fixture
def other(checkpoint, tmp_path):
    """The tiny checkpoint, a little different."""
    model = arcee_mlx.load_model(checkpoint)
    model.lm_head.weight = model.lm_head.weight + 0.05 * mx.random.normal(
        model.lm_head.weight.shape, key=mx.random.key(0)
    )
    arcee_mlx.save_checkpoint(model, tmp_path / "other")
    write_tokenizer(tmp_path / "other")
    return tmp_path / "other"


def measured(folder, **options):
    opened = open_model(folder)
    windows = cut_windows(read_tokenizer(folder), TEXT * 4, window_tokens=16, vocab_size=400, **options)
    return measure_perplexity(opened, windows), windows


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--num-samples", "3"], {"max_windows": 3}),
        (["--stride", "8", "--num-samples", "-1"], {"stride": 8}),
        ([], {"max_windows": 64}),
    ],
)
def test_numbers_are_those_of_the_text_and_table_and_json_agree(evaluate, checkpoint, capsys, arguments, options):
    expected, windows = measured(checkpoint, **options)
    assert evaluate("--json", *arguments) == 0
    captured = capsys.readouterr()
    values = json.loads(captured.out)
    assert captured.err == ""
    assert list(values) == [
        "model", "adapter", "reference", "text", "windows", "window_tokens",
        "tokens", "text_bytes", "perplexity", "standard_error", "bits_per_byte", "comparison",
    ]  # fmt: skip
    assert values.items() >= expected.to_dict().items()
    assert (values["text"], values["windows"], values["window_tokens"]) == ("text.txt", windows.ids.shape[0], 16)
    assert values["reference"] is values["comparison"] is None
    assert evaluate(*arguments) == 0
    first, _, _, row = capsys.readouterr().out.splitlines()
    assert f"{windows.ids.shape[0]} windows of 16 tokens predict {expected.tokens:,} tokens" in first
    numbers = (expected.perplexity, expected.standard_error, expected.bits_per_byte)
    assert row.split() == [*(f"{number:.4f}" for number in numbers), str(checkpoint)]


def test_a_reference_is_compared_with(evaluate, checkpoint, other, capsys):
    arguments = ["--num-samples", "4", "--reference", str(other)]
    own, windows = measured(checkpoint, max_windows=4)
    reference, _ = measured(other, max_windows=4)
    expected = compare(open_model(other), open_model(checkpoint), windows.ids, scored=windows.scored)
    assert expected.kl_mean > 1e-4
    assert evaluate("--json", *arguments) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["comparison"] == json.loads(json.dumps(expected.to_dict()))
    assert values["perplexity"] == pytest.approx(own.perplexity, rel=1e-6)
    assert values["standard_error"] == pytest.approx(own.standard_error, rel=1e-5)
    assert evaluate(*arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[3:5]] == [str(checkpoint), str(other)]
    assert float(lines[4].split()[0]) == pytest.approx(reference.perplexity, abs=1e-3)
    assert f"{expected.kl_mean:.3e} nats" in lines[6] and f"{expected.top1_agreement:.2%}" in lines[7]


def test_a_checkpoint_is_its_own_reference(evaluate, checkpoint, capsys):
    assert evaluate("--num-samples", "2", "--reference", str(checkpoint), "--json") == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["kl_max"] == 0


def test_a_model_with_few_positions_is_read_in_shorter_windows(tmp_path, text, capsys):
    write_checkpoint(tmp_path / "short", max_position_embeddings=24)
    assert main(["eval", str(tmp_path / "short"), "--text", str(text), "--json", "--num-samples", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["window_tokens"] == 24


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--stride", "16"], "stride 16"),
        (["--num-samples", "0"], "0 windows"),
        (["--num-samples", "-2"], "-2 windows"),
        (["--sequence-length", "300"], "--sequence-length is 300; expected at most 256"),
        (["--sequence-length", "1"], "sequence length 1"),
        (["--limit", "3"], "--limit without --tasks"),
        (["--tasks", "arc_easy"], "--text with --tasks"),
        (["--text", "missing.txt"], "missing.txt: cannot be read"),
        (["--reference", "./missing"], "missing"),
    ],
)
def test_what_cannot_be_measured_is_said(evaluate, capsys, arguments, words):
    assert evaluate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and words in captured.err


def test_a_reference_with_another_vocabulary_is_refused(evaluate, other, capsys):
    file = other / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["vocab"] = {
        f"{key}x" if index == 399 else key: index for key, index in values["model"]["vocab"].items()
    }
    values["model"]["merges"].pop()
    file.write_text(json.dumps(values))
    assert evaluate("--reference", str(other)) == 2
    assert "another vocabulary" in capsys.readouterr().err


def test_decoders_without_heads_are_refused(checkpoint, tmp_path, text, capsys):
    arcee_mlx.save_checkpoint(arcee_mlx.load_model(checkpoint).model, tmp_path / "decoder")
    write_tokenizer(tmp_path / "decoder")
    for arguments in ([str(tmp_path / "decoder")], [str(checkpoint), "--reference", str(tmp_path / "decoder")]):
        assert main(["eval", *arguments, "--text", str(text), "--sequence-length", "16", "--num-samples", "2"]) == 2
        assert "head" in capsys.readouterr().err


def test_without_lm_eval_it_says_how_to_get_it(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(lm_command, "find_spec", lambda name: None)
    assert main(["eval", str(checkpoint), "--tasks", "arc_easy"]) == 2
    error = capsys.readouterr().err
    assert "lm_eval is not installed" in error and "pip install 'mlx-lm[evaluate]'" in error
    assert main(["eval", str(checkpoint), "--tasks", " ,"]) == 2
    assert "--tasks is ' ,'; expected names" in capsys.readouterr().err


def test_what_lm_eval_is_asked_and_what_it_answers(checkpoint, monkeypatch, capsys):
    asked = []

    def run_command(command, arguments):
        print("mlx-lm's own words")
        folder = Path(arguments[arguments.index("--output-dir") + 1])
        asked.extend([command, *arguments[: arguments.index("--output-dir")]])
        results = {
            "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": 0.25, "em,strict": 1.0, "em_stderr,strict": "N/A"}
        }
        (folder / "eval").write_text(json.dumps(results))

    monkeypatch.setattr(lm_command, "run_command", run_command)
    command = ["eval", str(checkpoint), "--tasks", "a, b", "--num-shots", "0", "--limit", "5", "--batch-size", "2"]
    assert main(command) == 0
    captured = capsys.readouterr()
    rows = [line.split() for line in captured.out.splitlines()[1:]]
    assert rows == [["0.5000", "0.2500", "a,", "acc"], ["1.0000", "-", "a,", "em", "(strict)"]]
    assert captured.err == "mlx-lm's own words\n"
    assert asked == [
        "evaluate", "--model", str(checkpoint), "--tasks", "a", "b",
        "--num-shots", "0", "--limit", "5", "--batch-size", "2",
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["a"]["acc,none"] == 0.5


def test_lm_eval_really_runs(tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval", reason="pip install 'mlx-lm[evaluate]'")
    import datasets
    import lm_eval.evaluator

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    # Tasks are given as files; without this lm_eval first reads the thousands it brings.
    monkeypatch.setattr(
        lm_eval.evaluator, "TaskManager", partial(lm_eval.evaluator.TaskManager, include_defaults=False)
    )
    rows = [{"text": "Call me", "choices": [" Ishmael", " money"], "label": label} for label in (0, 1)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    Path("choice.yaml").write_text(json.dumps(task))
    mx.disable_compile()  # on the CPU backend each compiled function would start a C++ compiler
    try:
        assert main(["eval", str(arcee_mlx.DEMO_MODEL), "--tasks", "choice.yaml", "--json"]) == 0
    finally:
        mx.enable_compile()
    assert json.loads(capsys.readouterr().out)["tasks"]["choice"]["acc,none"] == 0.5


@pytest.mark.parametrize(("kind", "bits"), [("lora", 0), ("dora", 0), ("full", 0), ("lora", 8), ("by_neuron", 8)])
def test_an_adapters_numbers_are_those_of_the_fused_model(tmp_path, text, capsys, kind, bits):
    model = make_base()
    if kind == "by_neuron":
        store_by_neuron(model)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    arcee_mlx.save_checkpoint(model, tmp_path / "base")
    keys = None if bits or kind == "full" else EVERYWHERE
    adapter = write_mlx_lm(tmp_path / "adapter", kind={"by_neuron": "lora"}.get(kind, kind), keys=keys)
    fused = arcee_mlx.load_model(tmp_path / "base", adapter_path=adapter)
    arcee_mlx.fuse_adapter(fused, dequantize=True)
    arcee_mlx.save_checkpoint(fused, tmp_path / "fused")
    for name in ("base", "fused"):
        write_tokenizer(tmp_path / name)
    values = {}
    for name, options in {"base": [], "fused": [], "adapted": ["--adapter-path", str(adapter)]}.items():
        folder = str(tmp_path / ("base" if name == "adapted" else name))
        command = ["eval", folder, "--text", str(text), "--sequence-length", "16", "--num-samples", "3", *options]
        assert main([*command, "--reference", str(tmp_path / "base"), "--json"]) == 0
        values[name] = json.loads(capsys.readouterr().out)
    adapted, expected = values["adapted"], values["fused"]
    assert adapted["adapter"] == str(adapter) and expected["adapter"] is None
    assert adapted["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    assert adapted["comparison"]["kl_mean"] == pytest.approx(expected["comparison"]["kl_mean"], rel=1e-3)
    assert values["base"]["comparison"]["kl_mean"] < 1e-9 < 1e-3 < adapted["comparison"]["kl_mean"]
    assert main([*command, "--reference", str(tmp_path / "base")]) == 0
    assert f"base with {adapter}" in capsys.readouterr().out
