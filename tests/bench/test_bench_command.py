"""`arcee-mlx bench`: its subcommands and their options."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from arcee_mlx.bench.command import add_arguments
from arcee_mlx.checkpoint.loading import DEMO_MODEL
from arcee_mlx.cli import main


def test_defaults_are_what_the_readme_quotes() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert parser.parse_args(["startup"]).runs == 10
    batch = parser.parse_args(["batch"])
    assert (batch.runs, batch.max_tokens, batch.model) == (10, 64, str(DEMO_MODEL))
    grammar = parser.parse_args(["grammar"])
    assert (grammar.runs, grammar.max_tokens, grammar.model, grammar.clock) == (10, 64, str(DEMO_MODEL), "wall")
    assert parser.parse_args(["convert", "--layers", "9", "18"]).layers == [9, 18]


def test_batch_prints_every_rate_and_the_ratios(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "batch", "--model", str(checkpoint), "--runs", "1", "--max-tokens", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "mlx" in lines[0]
    assert [line.partition(" median")[0].strip() for line in lines[1:5]] == [
        "one by one", "batched", "engine, one by one", "engine, together",
    ]  # fmt: skip
    assert [line.partition(":")[0] for line in lines[5:]] == [
        "batched / one by one",
        "engine, together / engine, one by one",
    ]
    assert "8 answers of up to 2 tokens" in lines[-1]


def test_speculative_prints_both_rates_their_ratio_and_how_many_drafts_came_true(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(checkpoint), "--draft-model", str(checkpoint), "--runs", "1", "--max-tokens", "9"]
    assert main(["bench", "speculative", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["drafts", "plain", "ratio"]
    assert lines[-1].endswith("4.50 tokens per pass, 100% of the drafts accepted; the same tokens")


def test_grammar_prints_every_rate_and_the_ratio_of_each_program(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "grammar", "--runs", "1", "--max-tokens", "2", "--clock", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    programs = ["one", "8, batched", "8, engine"]
    assert [line.partition(" median")[0].strip() for line in lines[1:7]] == [
        f"{program}, {kind}" for program in programs for kind in ("schema", "free")
    ]
    assert [line.partition(":")[0] for line in lines[7:]] == programs
    assert "answers of up to 2 tokens" in lines[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("startup", "--runs", "0"),
        ("batch", "--max-tokens", "0"),
        ("grammar", "--max-tokens", "0"),
        ("speculative", "--max-tokens", "1"),
        ("speculative", "--num-draft-tokens", "0"),
    ],
)
def test_less_than_one_of_anything_is_refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert "expected at least" in capsys.readouterr().err
