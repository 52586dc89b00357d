"""From a CSV to a local classifier, on small data: training, stopping and going on, quantized bases, the result."""

from __future__ import annotations

import csv
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import arcee_mlx
from arcee_mlx import ArceeConfig, ArceeForCausalLM, ArceeForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import make_passages
import train_classifier

ROOT = Path(__file__).parents[2]
FLOAT_DEMO = ROOT / "tests" / "assets" / "demo"
PASSAGES = ROOT / "examples" / "data" / "passages.csv"
SEA, LAND = ("whale", "ship", "harpoon"), ("treaty", "union", "commerce")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_classifier.signal, "signal", lambda *_: None)


@pytest.fixture(scope="module")
def tokenizer() -> arcee_mlx.Tokenizer:
    return arcee_mlx.load_tokenizer(FLOAT_DEMO)


def write_base(folder: Path, tokenizer: arcee_mlx.Tokenizer, *, quantized: bool = False) -> Path:
    """A causal checkpoint of a few thousand weights."""
    config = ArceeConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, attention_dropout=0.1, dtype="float32", eos_token_id=3,
    )  # fmt: skip
    model = ArceeForCausalLM.from_config(config, seed=1)
    if quantized:
        nn.quantize(model, group_size=32, bits=8)
    arcee_mlx.save_checkpoint(model, folder, tokenizer)
    return folder


def write_texts(path: Path, count: int = 20) -> Path:
    """Texts that one word gives away."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        for i in range(count):
            label, words = (("sea", SEA), ("land", LAND))[i % 2]
            writer.writerow((f"{i}: the {words[i % 3]}, and the {words[(i + 1) % 3]}.", label))
    return path


def train(base: Path, out: str, *options: str, stop_after: int | None = None, monkeypatch: Any = None) -> int:
    """Runs the example on the small texts; `stop_after` interrupts it after so many steps."""

    class Stop:
        calls = 0

        def is_set(self) -> bool:
            self.calls += 1
            return stop_after is not None and self.calls > stop_after

    if monkeypatch is not None:
        monkeypatch.setattr(train_classifier.threading, "Event", Stop)
    data = write_texts(Path("texts.csv"))
    arguments = ["--data", str(data), "--model", str(base), "--out", out, "--batch-size", "3", "--rank", "2"]
    return train_classifier.main([*arguments, "--epochs", "2", *options])


def weights(folder: str) -> dict[str, mx.array]:
    return dict(tree_flatten(arcee_mlx.load_model(folder).parameters()))


@pytest.mark.parametrize("quantized", [False, True])
def test_a_stopped_training_goes_on_to_the_same_bits(
    tmp_path: Path, tokenizer: arcee_mlx.Tokenizer, monkeypatch: pytest.MonkeyPatch, quantized: bool
) -> None:
    base = write_base(tmp_path / "base", tokenizer, quantized=quantized)
    assert train(base, "straight") == 0
    for steps in (2, 5):  # within an epoch, and in the next one
        assert train(base, "resumed", stop_after=steps, monkeypatch=monkeypatch) == 130
        assert not Path("resumed").exists()
    with pytest.raises(SystemExit, match="learning_rate is .*: remove resumed-training"):
        train(base, "resumed", "--learning-rate", "0.1")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_classifier.signal, "signal", lambda *_: None)
    assert train(base, "resumed", "--grad-checkpoint") == 0
    one, other, start = (
        weights("straight"),
        weights("resumed"),
        dict(tree_flatten(arcee_mlx.load_model(base).parameters())),
    )
    assert one.keys() == other.keys()
    assert all(mx.array_equal(one[key], other[key]).item() for key in one)
    assert not mx.array_equal(
        one["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"]
    ).item()
    assert any(key.endswith(".scales") for key in one) is quantized and "score.scales" not in one
    log = Path("straight-training/log.csv").read_text()
    assert log == Path("resumed-training/log.csv").read_text() and len(log.splitlines()) == 1 + 2 * 6
    assert Path("straight-training/loss.png").stat().st_size > 5000


def test_the_adapter_alone_gives_the_same_classifier(tmp_path: Path, tokenizer: arcee_mlx.Tokenizer) -> None:
    base = write_base(tmp_path / "base", tokenizer)
    assert (
        train(base, "whole", "--learning-rate", "1e-2")
        == 0
        == train(base, "adapter", "--adapter", "--learning-rate", "1e-2")
    )
    whole = arcee_mlx.load_model("whole")
    assert isinstance(whole, ArceeForSequenceClassification) and whole.config.id2label == {0: "land", 1: "sea"}
    adapted = arcee_mlx.load_model(base, ArceeForSequenceClassification, num_labels=2, adapter_path="adapter")
    ids = mx.array([tokenizer.encode("The whale.")])
    expected, found = whole.forward(ids).logits, adapted.forward(ids).logits
    assert mx.abs(expected - found).max().item() < 1e-5 < mx.abs(expected).max().item()


def test_a_split_column_decides_and_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("split,text,label\ntrain,a,x\ntest,b,y\ntrain,c,y\n", encoding="utf-8-sig")
    assert train_classifier.read_rows(path, seed=0) == ([("a", "x"), ("c", "y")], [("b", "y")])
    write_texts(path)
    rows = train_classifier.read_rows(path, seed=0)
    assert [len(part) for part in rows] == [16, 4] and not set(rows[0]) & set(rows[1])
    for content, message in (("text\na\n", "label"), ("text,label\na,x\nb,x\n", "two labels")):
        path.write_text(content)
        with pytest.raises(SystemExit, match=message):
            train_classifier.read_rows(path, seed=0)


def test_no_address_or_chapter_of_the_passages_is_in_both_parts() -> None:
    with PASSAGES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    parts = {split: [row for row in rows if row["split"] == split] for split in ("train", "test")}
    sources = {split: {row["source"] for row in part} for split, part in parts.items()}
    assert [len(part) for part in parts.values()] == [600, 300] and not sources["train"] & sources["test"]
    assert all(int(source.split()[1]) % 5 == 0 for source in sources["test"])
    assert len({row["text"] for row in rows}) == 900 and all(200 <= len(row["text"]) <= 400 for row in rows)
    assert PASSAGES.stat().st_size < 300_000


def test_passages_are_whole_sentences_of_their_document(tmp_path: Path) -> None:
    sentence = "This sentence has exactly sixty characters, counted by hand. "
    (tmp_path / "text.txt").write_text(sentence * 9 + "x" * 500 + ". " + sentence * 4)
    (made,) = make_passages.read_documents(tmp_path / "text.txt")
    assert list(make_passages.cut(made)) == [(sentence * 4).strip()] * 2 + [(sentence * 4).strip()]


def test_the_readme_leads_from_a_csv_to_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.split("## From a CSV to a local classifier\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"```bash\n(.*?)\n```", section, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    words = shlex.split(command)
    arguments = words[words.index("examples/train_classifier.py") + 1 :]
    data, model, out = (arguments.index(name) + 1 for name in ("--data", "--model", "--out"))
    with (ROOT / arguments[data]).open(encoding="utf-8", newline="") as file:
        (tmp_path / "small.csv").write_text("".join(next(file) for _ in range(40)), encoding="utf-8")
    arguments[data], arguments[model] = "small.csv", str(ROOT / arguments[model])
    assert train_classifier.main([*arguments, "--epochs", "1"]) == 0 and Path(arguments[out]).is_dir()
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), {})
    label, _, score = capsys.readouterr().out.strip().rpartition(" ")
    assert label in {"novel", "old address", "modern address"} and 1 / 3 < float(score) <= 1
