"""`arcee-mlx inspect`: the table, the JSON, the exit status."""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import ArceeError, CheckpointError, InputError, inspect_checkpoint
from arcee_mlx.cli import main
from arcee_mlx.inspection.command import count_words, size_words

from checkpoint_changes import change_config, copy, put


def inspect(*arguments: str) -> int:
    return main(["inspect", *arguments])


def test_the_table_says_it_all_in_lines_that_fit(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert inspect(str(checkpoint)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == str(checkpoint) and lines[-1] == "verdict     loads"
    assert max(map(len, lines[1:])) <= 80
    labels = [line.split()[0] for line in lines[2:] if not line.startswith(" ")]
    assert labels == [
        "config", "rope", "context", "weights", "memory", "tokenizer", "template", "generation", "files", "findings",
        "verdict",
    ]  # fmt: skip
    for part in (
        "embedding",
        "attention",
        "mlp",
        "norms",
        "head",
        "all",
        "default",
        "256 positions",
        "model.safetensors",
    ):
        assert part in captured.out


def test_json_is_one_object_with_stable_keys(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(checkpoint), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == [
        "name", "loads", "folder", "commit", "findings", "config", "weights", "context", "memory", "tokenizer",
        "sampling", "files",
    ]  # fmt: skip
    assert values["loads"] is True and values["weights"]["total"]["bits_per_weight"] == 32
    assert values["files"]["config.json"]["use"] == "config"


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_what_does_not_load_is_status_1_and_still_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert inspect(str(tmp_path), *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err == "" and "config.json: no such file" in captured.out
    if arguments:
        assert json.loads(captured.out)["loads"] is False
    else:
        assert captured.out.splitlines()[-1] == "verdict     does not load (3 errors)"


@pytest.mark.parametrize(
    ("arguments", "kind"), [(("/nonexistent/folder",), CheckpointError), (("a b",), InputError), ((".", "--revision", "x"), InputError)]
)  # fmt: skip
def test_nothing_to_look_at_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], kind: type[ArceeError]
) -> None:
    assert inspect(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    with pytest.raises(kind):
        inspect_checkpoint(arguments[0], arguments[-1] if len(arguments) > 1 else None)


def test_nothing_of_a_checkpoint_reaches_the_terminal_unseen(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    put("model.\x1b[2J\u202e", mx.zeros(1))(folder)
    change_config(architectures=["ArceeForCausalLM\x07\ud800"])(folder)
    assert inspect(str(folder)) == 1
    table = capsys.readouterr().out
    assert r"model.\x1b[2J\u202e" in table and r"\x07\ud800" in table
    assert all(character.isprintable() or character == "\n" for character in table)
    assert inspect(str(folder), "--json") == 1
    assert json.loads(capsys.readouterr().out)["config"]["architectures"] == ["ArceeForCausalLM\x07\ud800"]


def test_sizes_and_counts_read_as_people_say_them() -> None:
    assert [size_words(n) for n in (0, 999, 1000, 73_728_000, 9_240_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "73.73 MB",
        "9.24 GB",
    ]
    assert [count_words(n) for n in (0, 999_999, 1_500_000, 4_619_189_760)] == ["0", "999,999", "1.50 M", "4.62 B"]
    assert math.isclose(arcee_mlx.inspection.results.Amount(tensors=1, parameters=8, size_bytes=4).bits_per_weight, 4)
