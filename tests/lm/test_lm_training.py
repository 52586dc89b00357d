"""Fine-tuning of the causal model through mlx-lm's tuner: checkpointing, going on, full, quantized, fuse, convert."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import ArceeConfig, ArceeForCausalLM
from arcee_mlx.lm.command import main
from arcee_mlx.model.decoder import DecoderLayer
from arcee_mlx.model.relu2.down import store_by_neuron
from arcee_mlx.upstream import mlx_lm_module

from lm_data import write_data, write_home

IDS = mx.array([[5, 6, 7, 300, 8]])
SMALL = ["--batch-size", "1", "--val-batches", "1", "--max-seq-length", "32", "--num-layers", "2", "--seed", "3"]


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home and a working folder of a test's own, and nothing compiled or patched that outlives it."""
    import datasets

    monkeypatch.setenv("HOME", str(write_home(tmp_path / "home")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # --grad-checkpoint replaces it
    write_data(tmp_path / "data")
    state: Any = np.random.get_state()
    mx.disable_compile()  # on the CPU backend each compiled function would start a C++ compiler
    yield
    mx.enable_compile()
    np.random.set_state(state)


@pytest.fixture(scope="module")
def tokenizer() -> arcee_mlx.Tokenizer:
    return arcee_mlx.load_tokenizer(arcee_mlx.DEMO_MODEL)


def write_base(tokenizer: arcee_mlx.Tokenizer, *, quantized: bool = False, by_neuron: bool = False) -> str:
    config = ArceeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, dtype="float32", pad_token_id=4, eos_token_id=3,
    )  # fmt: skip
    model = ArceeForCausalLM.from_config(config, seed=1)
    if by_neuron:
        store_by_neuron(model)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    arcee_mlx.save_checkpoint(model, "base", tokenizer)
    return "base"


def train(adapter: str, *options: str, iters: int = 3) -> dict[str, mx.array]:
    """Trains the base and gives what was written."""
    arguments = ["lora", "--train", "--model", "base", "--data", "data", "--adapter-path", adapter, *SMALL]
    assert main([*arguments, "--learning-rate", "1e-2", "--iters", str(iters), *options]) == 0
    return dict(mx.load(f"{adapter}/adapters.safetensors").items())


def largest(a: mx.array, b: mx.array) -> float:
    return mx.abs(a - b).max().item()


@pytest.mark.parametrize(("kind", "quantized"), [("lora", False), ("lora", True), ("full", False)])
def test_grad_checkpoint_trains_to_the_same_bits(tokenizer: arcee_mlx.Tokenizer, kind: str, quantized: bool) -> None:
    write_base(tokenizer, quantized=quantized)
    plain = train("plain", "--fine-tune-type", kind)
    ours = DecoderLayer.__call__
    again = train("again", "--fine-tune-type", kind, "--grad-checkpoint")
    assert DecoderLayer.__call__ is not ours  # mlx-lm's way took hold of our layer
    assert plain.keys() == again.keys() and plain
    assert [key for key in plain if not mx.array_equal(plain[key], again[key]).item()] == []
    assert any(mx.abs(value).max().item() > 0 for key, value in plain.items() if key.endswith(("lora_b", "weight")))


@pytest.mark.parametrize(
    ("kind", "base"),
    [
        ("lora", "float"),
        ("dora", "float"),
        ("full", "float"),
        ("lora", "standard"),
        ("dora", "standard"),
        ("lora", "by_neuron"),
    ],
)
def test_training_goes_on_from_a_saved_adapter_then_fuses_and_converts(
    tokenizer: arcee_mlx.Tokenizer, kind: str, base: str
) -> None:
    """Fused floats are the adapted model but for float noise; each rounding costs the same order as of the base."""
    write_base(tokenizer, quantized=base != "float", by_neuron=base == "by_neuron")
    first = train("first", "--fine-tune-type", kind)
    resume = ["--resume-adapter-file", "first/adapters.safetensors", "--fine-tune-type", kind]
    still = train("still", *resume, "--learning-rate", "0")
    assert [
        key for key in first if not mx.array_equal(first[key], still[key]).item()
    ] == []  # it begins where that ended
    second = train("second", *resume)
    assert any(largest(first[key], second[key]) > 0 for key in first)

    source = arcee_mlx.load_model("base")(IDS)
    adapted = arcee_mlx.load_model("base", adapter_path="second")(IDS)
    moved, size = largest(adapted, source), mx.abs(adapted).max().item()
    assert fuse("packed") and largest(logits("packed"), adapted) < (0.2 * moved if base != "float" else 1e-5 * size)
    assert ("packed" in find_packed()) is (base != "float")
    assert fuse("floats", "--dequantize") and largest(logits("floats"), adapted) < 1e-5 * size < 0.01 * moved
    assert "floats" not in find_packed()

    for layout, folder in (("by_neuron", "fused"), ("standard", "fused-standard")):
        assert convert("floats", folder, layout) == 0
        assert arcee_mlx.load_model(folder).config.down_proj_layout == layout
    unpacked = "base"
    if base != "float":
        assert main(["convert", "-d", "--hf-path", "base", "--mlx-path", "unpacked"]) == 0
        unpacked = "unpacked"
    assert convert(unpacked, "rounded", "standard") == 0
    noise = deviation(logits("rounded"), source)  # of rounding the base to 4 bits
    assert 0 < deviation(logits("fused-standard"), adapted) < 2 * noise < deviation(adapted, source)
    assert 0 < deviation(logits("fused"), adapted) < 2 * noise


def deviation(a: mx.array, b: mx.array) -> float:
    """Of two models' logits: the root of their mean square difference, which no single logit decides."""
    return (a - b).square().mean().sqrt().item()


def fuse(folder: str, *options: str) -> bool:
    return main(["fuse", "--model", "base", "--adapter-path", "second", "--save-path", folder, *options]) == 0


def convert(source: str, folder: str, layout: str) -> int:
    from arcee_mlx.cli import main as arcee

    options = ["-q", "--q-bits", "4", "--q-group-size", "32", "--layout", layout, "--quiet"]
    return arcee(["convert", "--hf-path", source, "--mlx-path", folder, *options])


def logits(folder: str) -> mx.array:
    """Of what was written; mlx-lm computes the same from it."""
    ours = arcee_mlx.load_model(folder)(IDS)
    assert mx.array_equal(mlx_lm_module("utils").load(folder)[0](IDS), ours).item()
    return ours


def find_packed() -> set[str]:
    return {path.parent.name for path in Path().glob("*/config.json") if "quantization" in json.loads(path.read_text())}
