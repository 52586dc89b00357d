"""Every mlx-lm command on the demo model, at small size and offline: `python -m arcee_mlx.lm <command>`."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx.lm.command import COMMANDS, main
from arcee_mlx.model.decoder import DecoderLayer
from arcee_mlx.upstream import mlx_lm_module

from lm_data import write_data, write_home

IDS = mx.array([[5, 6, 7, 300, 8]])


@pytest.fixture(scope="module")
def demo() -> str:
    """The demo model that comes with the package, quantized."""
    return str(arcee_mlx.DEMO_MODEL)


@pytest.fixture(scope="module")
def float_demo() -> str:
    """The float checkpoint it was made from: for full fine-tuning and for what quantizes."""
    return str(Path(__file__).parents[1] / "assets" / "demo")


@pytest.fixture(scope="module")
def shallow(float_demo: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The first layer of the demo model: the quantization searches take a minute for all of it."""
    model, tokenizer = arcee_mlx.load(float_demo)
    config = arcee_mlx.ArceeConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": 1})
    first = arcee_mlx.ArceeForCausalLM(config)
    first.update(model.parameters() | {"model": model.model.parameters() | {"layers": [model.layers[0].parameters()]}})
    folder = tmp_path_factory.mktemp("shallow") / "model"
    arcee_mlx.save_checkpoint(first, folder, tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_data(tmp_path_factory.mktemp("data") / "set"))


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home with the calibration text, an empty working folder, and nothing compiled or patched that outlives a test."""
    import datasets

    monkeypatch.setenv("HOME", str(write_home(tmp_path / "home")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # --grad-checkpoint replaces it
    mx.disable_compile()  # on the CPU backend each compiled function would start a C++ compiler
    yield
    mx.enable_compile()


def lm(*arguments: str) -> None:
    """`python -m arcee_mlx.lm ...`, in this process."""
    assert main(arguments) == 0


def apart(a: mx.array, b: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


def check_output(folder: str, source: str, largest: float) -> None:
    """Both packages read what a command wrote, alike, and it is not far from the source."""
    ours, _ = arcee_mlx.load(folder)
    theirs, _ = mlx_lm_module("utils").load(folder)
    assert mx.array_equal(ours(IDS), theirs(IDS)).item()
    assert apart(ours(IDS), arcee_mlx.load_model(source)(IDS)) <= largest


def test_every_command_of_mlx_lm_that_reads_a_model_is_here() -> None:
    source = ast.parse(inspect.getsource(mlx_lm_module("cli")))
    tuples = [node for node in ast.walk(source) if isinstance(node, ast.Tuple)]
    upstream = max(({element.value for element in node.elts} for node in tuples), key=len)
    assert upstream - COMMANDS.keys() == {"manage", "share", "upload"}
    assert COMMANDS.keys() <= upstream


@pytest.mark.parametrize("options", [["--max-kv-size", "16"], ["--kv-bits", "8", "--quantized-kv-start", "4"]])
def test_generate(demo: str, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", demo, "--prompt", "Call me", "--max-tokens", "12", "--ignore-chat-template"]
    lm(*command, *options, "--kv-group-size", "32")
    assert "Generation: 12 tokens" in capsys.readouterr().out


def test_cache_prompt_then_generate(demo: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", demo, "--prompt-cache-file", "prompt.safetensors"]
    lm("cache_prompt", *arguments, "--prompt", "Call me")
    lm("generate", *arguments[2:], "--model", demo, "--prompt", "Ishmael", "--max-tokens", "3")
    assert "Generation: " in capsys.readouterr().out


def test_chat(demo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Call me\nr\nq\n"))
    lm("chat", "--model", demo, "--max-tokens", "4", "--max-kv-size", "64")
    shown = capsys.readouterr().out
    assert "tokens" in shown and "reset" in shown and "bye" in shown


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_benchmark(demo: str, batch_size: str, capsys: pytest.CaptureFixture[str]) -> None:
    lm("benchmark", "--model", demo, "-p", "8", "-g", "4", "-n", "1", "-b", batch_size)
    assert "generation_tps" in capsys.readouterr().out


def test_perplexity(demo: str, data: str, capsys: pytest.CaptureFixture[str]) -> None:
    lm("perplexity", "--model", demo, "--data-path", data, "--sequence-length", "32", "--num-samples", "3")
    (perplexity,) = re.findall(r"Perplexity: ([\d.]+)", capsys.readouterr().out)
    assert float(perplexity) > 1


def test_evaluate(demo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="pip install 'mlx-lm[evaluate]'")
    import lm_eval.evaluator

    # Tasks are given as files; without this lm_eval first reads the thousands it brings.
    monkeypatch.setattr(
        lm_eval.evaluator, "TaskManager", partial(lm_eval.evaluator.TaskManager, include_defaults=False)
    )
    rows = [{"text": "Call me", "choices": [" Ishmael", " money"], "label": label} for label in (0, 1)]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choice = {"task": "choice", "output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    choice |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    until = {"task": "until", "output_type": "generate_until", "doc_to_target": "{{choices[label]}}"}
    until |= {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}}
    until |= {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]}
    for name, values in (("choice.yaml", choice), ("until.yaml", until)):
        Path(name).write_text(json.dumps(task | values))
    lm("evaluate", "--model", demo, "--tasks", "choice.yaml", "until.yaml", "--output-dir", "results")
    (results,) = Path("results").iterdir()
    scores = json.loads(results.read_text())
    assert scores["choice"]["acc,none"] == 0.5 and scores["until"]["exact_match,none"] <= 0.5


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_lora_then_fuse(float_demo: str, data: str, kind: str) -> None:
    train = [
        "lora",
        "--model",
        float_demo,
        "--train",
        "--data",
        data,
        "--fine-tune-type",
        kind,
        "--adapter-path",
        "adapter",
    ]
    small = ["--iters", "2", "--batch-size", "1", "--num-layers", "1", "--val-batches", "1", "--max-seq-length", "32"]
    lm(*train, *small, "--learning-rate", "1e-2", "--grad-checkpoint")
    lm("generate", "--model", float_demo, "--adapter-path", "adapter", "--prompt", "Call", "--max-tokens", "2")
    lm("fuse", "--model", float_demo, "--adapter-path", "adapter", "--save-path", "fused")
    adapted, _ = mlx_lm_module("utils").load(float_demo, adapter_path="adapter")
    fused, source = arcee_mlx.load_model("fused")(IDS), arcee_mlx.load_model(float_demo)(IDS)
    assert apart(fused, adapted(IDS)) < 0.1 * apart(fused, source)


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_lora_on_a_quantized_model_then_fuse(demo: str, float_demo: str, data: str, layout: str) -> None:
    quantized = demo
    if layout == "standard":
        quantized = "quantized"
        lm("convert", "--model", float_demo, "--mlx-path", quantized, "-q", "--q-group-size", "32")
    train = ["lora", "--model", quantized, "--train", "--test", "--data", data, "--adapter-path", "adapter"]
    small = ["--iters", "1", "--batch-size", "1", "--num-layers", "1", "--val-batches", "1", "--max-seq-length", "32"]
    lm(*train, *small, "--test-batches", "1")
    lm("fuse", "--model", quantized, "--adapter-path", "adapter", "--save-path", "fused")
    check_output("fused", quantized, 0.1)


def test_convert_quantizes_and_back(float_demo: str) -> None:
    quantize = ["-q", "--q-bits", "8", "--q-group-size", "32"]
    lm("convert", "--hf-path", float_demo, "--mlx-path", "quantized", *quantize)
    check_output("quantized", float_demo, 0.05)
    lm("convert", "--model", "quantized", "--mlx-path", "float", "-d")
    check_output("float", float_demo, 0.05)
    assert "quantization" not in json.loads(Path("float/config.json").read_text())


def test_gptq(shallow: str) -> None:
    search = ["--group-size", "32", "--fallback-group-size", "32", "--num-samples", "2", "--sequence-length", "32"]
    lm("gptq", "--model", shallow, "--mlx-path", "out", "--bits", "8", "--fallback-bits", "8", *search)
    check_output("out", shallow, 0.1)


def test_awq(shallow: str) -> None:
    search = ["--group-size", "32", "--num-samples", "2", "--sequence-length", "32", "--n-grid", "3"]
    lm("awq", "--model", shallow, "--mlx-path", "out", "--bits", "8", "--embed-bits", "8", *search)
    check_output("out", shallow, 0.1)


def test_dynamic_quant(shallow: str) -> None:
    search = ["--low-group-size", "32", "--high-group-size", "32", "--low-bits", "6", "--high-bits", "8"]
    arguments = ["--model", shallow, "--mlx-path", "out", "--target-bpw", "8", "--grad-checkpoint"]
    lm("dynamic_quant", *arguments, *search)
    check_output("out", shallow, 0.2)


def test_dwq(shallow: str, data: str) -> None:
    search = ["--bits", "6", "--group-size", "32", "--num-samples", "1", "--max-seq-length", "17", "--batch-size", "1"]
    lm("dwq", "--model", shallow, "--mlx-path", "out", "--data-path", data, *search, "--grad-checkpoint")
    check_output("out", shallow, 0.2)
