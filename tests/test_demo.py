"""The bundled demo model: small, really trained, and made from its float source by this package's own conversion."""

from __future__ import annotations

import math
from pathlib import Path

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import ArceeForCausalLM, GenerateOptions, Tokenizer
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.run import convert
from arcee_mlx.model.config import read_config

FLOAT_SOURCE = Path(__file__).parent / "assets" / "demo"
# From chapter 80 of Moby-Dick and from the address of December 1869, neither of which the model or its tokenizer saw.
UNSEEN = (
    "If you unload his skull of its spermy heaps and then take a rear view of its rear end, which is the high end, you "
    "will be struck by its resemblance to the human skull, beheld in the same situation, and from the same point of view.",
    "Although your efforts have not met with the success in all particulars that might have been desired, yet on the "
    "whole they have been more successful than could have been reasonably anticipated.",
)


@pytest.fixture(scope="module")
def demo() -> tuple[ArceeForCausalLM, Tokenizer]:
    return arcee_mlx.load(arcee_mlx.DEMO_MODEL)


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def test_it_is_small_enough_to_come_along() -> None:
    assert size(arcee_mlx.DEMO_MODEL) <= 6_000_000
    assert size(FLOAT_SOURCE) <= 16_000_000


def test_its_config_has_what_makes_arcee_arcee() -> None:
    config = read_config(arcee_mlx.DEMO_MODEL)
    assert config.hidden_act == "relu2" and config.rope["rope_type"] == "yarn"
    assert config.kv_heads < config.num_attention_heads
    assert config.hidden_size % 128 == 0 and config.head_dim == 64


def test_it_is_this_packages_own_conversion_of_the_float_source(tmp_path: Path) -> None:
    convert(FLOAT_SOURCE, tmp_path / "demo", Recipe(quantization=Quantization(bits=8)))
    made, bundled = tmp_path / "demo", arcee_mlx.DEMO_MODEL
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (made / name).read_bytes() == (bundled / name).read_bytes(), name
    assert read_config(made) == read_config(bundled)


@pytest.mark.parametrize("text", UNSEEN)
def test_it_has_learned_english(demo: tuple[ArceeForCausalLM, Tokenizer], text: str) -> None:
    model, tokenizer = demo
    ids = mx.array([tokenizer.encode(text)])
    nats = model.forward(ids, labels=ids).loss.item() * (ids.size - 1)
    assert nats / math.log(2) / len(text.encode()) < 2.0  # an untrained model has about 4 bits per byte


def test_its_answers_end_by_themselves(demo: tuple[ArceeForCausalLM, Tokenizer]) -> None:
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    reasons = []
    for seed in range(5):
        options = GenerateOptions(max_tokens=250, seed=seed)
        reasons.append(list(arcee_mlx.stream_generate(*demo, messages, options))[-1].stop_reason)
    assert reasons.count("eos") >= 3


def test_quantization_changed_little(demo: tuple[ArceeForCausalLM, Tokenizer]) -> None:
    model, tokenizer = demo
    source = arcee_mlx.load_model(FLOAT_SOURCE, ArceeForCausalLM)
    ids = mx.array([tokenizer.encode(" ".join(UNSEEN))])
    a, b = (m.forward(ids, labels=ids).loss.item() for m in (source, model))
    assert abs(a - b) < 0.02
