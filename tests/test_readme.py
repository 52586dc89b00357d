"""What the README shows is what happens: its Python runs as it stands, and its commands name what exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from arcee_mlx.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_runs_as_it_stands(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    codes = [code for code in blocks("python") if "my-classifier" not in code]  # test_train_classifier.py runs that
    assert len(codes) == len(blocks("python")) - 1 == 10
    scope: dict[str, object] = {}
    for code in codes:
        exec(compile(code, "README.md", "exec", dont_inherit=True), scope)
    assert len(capsys.readouterr().out.splitlines()) >= 4


def test_the_commands_parse_as_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr("arcee_mlx.cli.run_reporting", lambda run: ran.append("parsed") or 0)
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    ours = [line[1:] for line in lines if line[0].endswith("arcee-mlx")]
    assert [line[0] for line in ours] == [
        "doctor", "convert", "generate", "inspect", "eval", "eval", "score", "embed", "sparsity", "bench", "bench", "classify",
        "tag", "answer", "chat",
    ]  # fmt: skip
    for line in ours:
        assert main(line) == 0
    assert len(ran) == len(ours)


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_the_first_command_uses_the_bundled_demo() -> None:
    (line,) = [line for block in blocks("bash") for line in block.splitlines() if "arcee_mlx.generate" in line]
    assert "--model" not in line
