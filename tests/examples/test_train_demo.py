"""The training script of the demo model, on a tiny model and invented text."""

from __future__ import annotations

import json
import lzma
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import arcee_mlx

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import demo_text
import train_demo

WORDS = [
    "the",
    "ship",
    "whale",
    "sea",
    "union",
    "nation",
    "people",
    "treaty",
    "captain",
    "harpoon",
    "commerce",
    "law",
    "peace",
    "of",
    "and",
    "to",
    "with",
    "our",
]


def write_text(path: Path) -> Path:
    """Forty-one addresses of invented sentences."""
    rng = random.Random(0)
    sentence = lambda: " ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + "."  # noqa: E731
    path.write_bytes(lzma.compress("\n\n".join(" ".join(sentence() for _ in range(90)) for _ in range(41)).encode()))
    return path


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script with a model of a few thousand weights; `stop_after` interrupts it after so many steps."""
    text = write_text(tmp_path / "text.txt.xz")

    def build_tiny(tokenizer: Any, seed: int) -> arcee_mlx.ArceeForCausalLM:
        mx.random.seed(seed)
        config = arcee_mlx.ArceeConfig(
            vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=2048, tie_word_embeddings=True, dtype="float32",
        )  # fmt: skip
        return arcee_mlx.ArceeForCausalLM(config)

    def start(name: str, *, steps: int = 4, stop_after: int | None = None) -> int:
        class Stop:
            calls = 0

            def is_set(self) -> bool:
                self.calls += 1
                return stop_after is not None and self.calls > stop_after

            def set(self) -> None: ...

        monkeypatch.setattr(train_demo, "build_model", build_tiny)
        monkeypatch.setattr(train_demo, "threading", SimpleNamespace(Event=Stop))
        monkeypatch.setattr(train_demo.signal, "signal", lambda *_: None)
        arguments = ["--text", str(text), "--work", str(tmp_path / f"{name}-work"), "--out", str(tmp_path / name)]
        sizes = ["--batch-tokens", "256", "--context-tokens", "64"]
        return train_demo.main([*arguments, *sizes, "--steps", str(steps)])

    return start


def test_an_interrupted_run_goes_on_exactly(run: Any, tmp_path: Path) -> None:
    assert run("straight") == 0
    assert run("resumed", stop_after=2) == 130
    assert not (tmp_path / "resumed").exists()
    assert run("resumed") == 0
    a, b = (dict(tree_flatten(arcee_mlx.load_model(tmp_path / name).parameters())) for name in ("straight", "resumed"))
    assert a.keys() == b.keys()
    assert all(mx.array_equal(a[key], b[key]).item() for key in a)


def test_the_result_is_a_checkpoint_that_chats(run: Any, tmp_path: Path) -> None:
    assert run("out", steps=1) == 0
    model, tokenizer = arcee_mlx.load(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["ArceeForCausalLM"] and config["dtype"] == "bfloat16"
    assert tokenizer.eos_token_ids == {1, 3}
    messages = [{"role": "user", "content": "Hello."}]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "<|begin_of_text|><|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"
    assert isinstance(arcee_mlx.generate(model, tokenizer, messages, arcee_mlx.GenerateOptions(max_tokens=3)), str)


def test_the_held_out_part_is_every_fortieth_document(tmp_path: Path) -> None:
    documents = list(demo_text.read_documents(write_text(tmp_path / "text.txt.xz")))
    training, held_out = demo_text.split_documents(documents)
    assert (len(documents), len(training)) == (41, 40) and held_out == [documents[39]]


def test_chapters_and_sentences_are_found_as_a_reader_would(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text(
        "Title\n\nCHAPTER 1. One.\n\nMr. Smith went.\nHe “sat.” So!\n\nCHAPTER 2. Two.\n\nEnd.\n"
    )
    first, second = demo_text.read_documents(tmp_path / "novel.txt")
    cut = list(zip(first.starts, first.starts[1:], strict=False))
    assert [first.text[a:b].strip() for a, b in cut] == ["Mr. Smith went.", "He “sat.”", "So!"]
    assert (first.voice, second.text) == ("sea", "End.")
