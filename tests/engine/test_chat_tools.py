"""`arcee-mlx chat --tools`: calls are asked about, run or not, and answered; over a pipe the next line says which."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from arcee_mlx import DEMO_MODEL
from arcee_mlx.cli import main
from arcee_mlx.engine.chat import MAX_TOOL_ROUNDS

Talk = Callable[..., tuple[int, str, str]]
TOOLS = '''
from typing import Literal

def measure(sea: Literal["Pacific"]) -> str:
    """Measures a sea.

    Args:
        sea: Which.
    """
    with open("ran.txt", "a") as file:
        file.write(sea + "\\n")
    return "4 km"

async def sail() -> None:
    """Sails."""

number = 3
'''
REQUIRED = ("--tools", "sea_tools:measure", "--tool-choice", "required", "--temp", "0", "--max-tokens", "60")


@pytest.fixture
def talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Pipes text through the program, in a folder with a module of tools."""
    (tmp_path / "sea_tools.py").write_text(TOOLS)
    (tmp_path / "broken_tools.py").write_text("1 +")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "sea_tools", raising=False)

    def talk(text: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        status = main(["chat", "--model", str(DEMO_MODEL), *arguments])
        said = capsys.readouterr()
        return status, said.out, said.err

    return talk


def runs(folder: Path) -> int:
    path = folder / "ran.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_call_is_asked_about_run_and_answered(talk: Talk, tmp_path: Path) -> None:
    status, out, err = talk("How deep?\nyes\n", *REQUIRED)
    assert status == 0 and err.count("Run measure(sea='Pacific')? [y/N] yes") == runs(tmp_path) >= 1
    assert "(measure: 4 km)" in err and "<tool_call>" not in out and len(out.strip()) > 10


@pytest.mark.parametrize(
    "said", ["How deep?\nn\n", "How deep?\n\n", "How deep?\n"], ids=["no", "enter", "end of input"]
)
def test_what_is_not_allowed_does_not_run(talk: Talk, tmp_path: Path, said: str) -> None:
    status, out, err = talk(said, *REQUIRED)
    assert status == 0 and runs(tmp_path) == 0
    assert "Run measure(" in err and "(measure: error: the user does not want this call)" in err and out.strip()


def test_what_answers_the_question_with_something_else_is_no_permission_and_no_message(
    talk: Talk, tmp_path: Path
) -> None:
    status, _, err = talk("How deep?\nAnd how wide?\n", *REQUIRED)
    assert status != 0 and runs(tmp_path) == 0 and "is answered 'And how wide?'; expected y or n" in err


def test_a_model_that_only_calls_is_left_alone_after_some_rounds(
    talk: Talk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcee_mlx.engine.chat.free_to_call", lambda options: options)
    status, _, err = talk("How deep?\n" + "y\n" * MAX_TOOL_ROUNDS, *REQUIRED)
    assert status == 0 and runs(tmp_path) >= MAX_TOOL_ROUNDS and "are left alone" in err


def test_undo_takes_back_the_question_with_its_calls(talk: Talk) -> None:
    status, _, err = talk("How deep?\ny\n/undo\n", *REQUIRED)
    assert status == 0 and "(0 messages are left)" in err


def test_calls_stay_in_the_conversation_under_another_system_prompt_and_in_a_file(talk: Talk, tmp_path: Path) -> None:
    said = "How deep?\ny\n/system Be brief.\n/save s.safetensors\n/load s.safetensors\n/again\n"
    status, out, err = talk(said, *REQUIRED, "--quiet")
    assert status == 0 and "(5 messages)" in err and "error" not in err and len(out.strip().splitlines()) >= 2


def test_a_call_that_was_cut_off_is_shown(talk: Talk, tmp_path: Path) -> None:
    status, out, err = talk("How deep?\n", *REQUIRED, "--max-tokens", "8")
    assert status == 0 and "<tool_call>" in out and "cut off" in err and runs(tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tools", "nowhere:measure"), "'nowhere:measure', which cannot be imported"),
        (("--tools", "sea_tools:sink"), "'sea_tools:sink', which cannot be imported"),
        (("--tools", "sea_tools"), "expected MODULE:FUNCTION"),
        (("--tools", "broken_tools:x"), "'broken_tools:x', which cannot be imported (SyntaxError"),
        (("--tools", "sea_tools:number"), "of type int; expected a function"),
        (("--tools", "sea_tools:sail"), "coroutine function"),
        (("--tools", "sea_tools:measure,sea_tools:measure"), "the name of two"),
        (("--tool-choice", "required"), "--tool-choice without --tools"),
        (("--tools", "sea_tools:measure", "--tool-choice", "sail"), "tool_choice is 'sail'"),
    ],
)
def test_tools_that_are_none_are_refused(talk: Talk, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = talk("Hi\n", *arguments)
    assert status != 0 and out == "" and message in err
