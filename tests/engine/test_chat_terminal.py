"""`arcee-mlx chat` in a terminal: what Ctrl-C and Ctrl-D do at each moment, editing, history, what goes where."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from arcee_mlx import Engine
from arcee_mlx.engine.chat_command import HOW_TO_LEAVE, PROMPT, WELCOME

from conftest import write_checkpoint

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
CTRL_C, CTRL_D, UP = b"\x03", b"\x04", b"\x1b[A"
# The terminal becomes the one that controls the program, so that its Ctrl-C is a signal.
PROGRAM = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from arcee_mlx.cli import main
sys.exit(main())
"""


class Terminal:
    """A program in a terminal, as who sits before it has it.

    Attributes:
        shown: all that appeared and was not waited for yet.
    """

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self.shown = process, ""
        self._descriptor = descriptor

    def type(self, keys: str | bytes) -> None:
        os.write(self._descriptor, keys.encode() if isinstance(keys, str) else keys)

    def wait_for(self, words: str) -> str:
        """Waits until words appear; gives what appeared before them."""
        until_s = time.monotonic() + PATIENCE_S
        while words not in self.shown:
            assert self._read(until_s - time.monotonic()), f"no {words!r} in {self.shown[-2000:]!r}"
        before, _, self.shown = self.shown.partition(words)
        return before

    def press_until(self, key: bytes, words: str) -> None:
        """Presses a key every second until words appear: Python can miss a Ctrl-C while it begins to wait for keys."""
        until_s = time.monotonic() + PATIENCE_S
        while words not in self.shown:
            assert time.monotonic() < until_s, f"no {words!r} in {self.shown[-2000:]!r}"
            self.type(key)
            while words not in self.shown and self._read(1.0):
                pass
        self.wait_for(words)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._descriptor], [], [], max(timeout_s, 0))[0]:
            return False
        try:
            read = os.read(self._descriptor, 65536)
        except OSError:  # how Linux tells that the program is gone
            read = b""
        assert read, f"the program ended: {self.shown[-2000:]!r}"
        self.shown += read.decode("utf-8", "replace")
        return True

    def wait_for_end(self) -> int:
        return self.process.wait(PATIENCE_S)


@contextmanager
def open_terminal(*arguments: str, folder: Path, answers: int | None = None) -> Iterator[Terminal]:
    """Runs the program in a terminal; its standard output goes to `answers` where that is given."""
    ours, theirs = pty.openpty()
    settings = termios.tcgetattr(theirs)
    settings[3] |= termios.NOFLSH  # or Ctrl-C throws away what was written and not read yet
    termios.tcsetattr(theirs, termios.TCSANOW, settings)
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT), "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, "chat", *arguments],
        stdin=theirs, stdout=theirs if answers is None else answers, stderr=theirs, start_new_session=True,
        env=environment, cwd=folder,
    )  # fmt: skip
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a model that writes # until it is stopped."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    write_checkpoint(folder, max_position_embeddings=1_000_000)
    with Engine.load(folder) as engine:
        (token,) = engine.tokenizer.encode("#", add_special_tokens=False)
    return ["--model", str(folder), "--temp", "0", "--max-tokens", "200000", "--logit-bias", f"{token}=10000"]


def test_ctrl_c_stops_the_answer_not_the_program_and_what_was_made_is_kept(endless: list[str], tmp_path: Path) -> None:
    with open_terminal(*endless, folder=tmp_path) as terminal:
        assert WELCOME in terminal.wait_for(PROMPT)
        made = []
        for question in ("Call me", "Why?"):
            terminal.type(f"{question}\n")
            terminal.wait_for(f"{question}\r\n")
            before = terminal.wait_for("####")
            terminal.type(CTRL_C)
            made.append(before + "####" + terminal.wait_for("(stopped)"))
            terminal.wait_for(PROMPT)
        terminal.type("/save talk.safetensors\n")
        terminal.wait_for("(saved as talk.safetensors)")
        terminal.wait_for(PROMPT)
        terminal.type("/quit\n")
        assert terminal.wait_for_end() == 0
    with Engine.load(endless[1]) as engine:
        messages = engine.load_session(tmp_path / "talk.safetensors").messages
    answers = [text.count("#") * "#" for text in made]
    assert [message.content for message in messages] == ["Call me", answers[0], "Why?", answers[1]]


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_ctrl_d_leaves(checkpoint: Path, tmp_path: Path) -> None:
    with open_terminal("--model", str(checkpoint), "--quiet", folder=tmp_path) as terminal:
        assert terminal.wait_for(PROMPT) == ""
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.press_until(CTRL_C, HOW_TO_LEAVE)
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.wait_for_end() == 0


def test_a_terminal_is_told_of_mistakes_and_the_conversation_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    with open_terminal("--model", str(checkpoint), "--max-tokens", "6", folder=tmp_path) as terminal:
        for line, words in (("/sing", "error: '/sing'"), ("/load no.safetensors", "error: "), ("Hi", "(cut off"),
                            ("/save no/such/folder.safetensors", "error: "), ("/stats", "2 messages")):  # fmt: skip
            terminal.wait_for(PROMPT)
            terminal.type(f"{line}\n")
            terminal.wait_for(words)
        terminal.wait_for(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.wait_for_end() == 0
    assert list(tmp_path.iterdir()) == []  # what was typed is kept nowhere unless asked


def test_lines_come_back_with_the_arrow_key_also_next_time_where_a_file_is_named(
    checkpoint: Path, tmp_path: Path
) -> None:
    pytest.importorskip("readline", reason="this Python has no readline")
    for keys in (b"/system Sail.\n", UP + b"\n"):
        with open_terminal("--model", str(checkpoint), "--history-file", "lines", folder=tmp_path) as terminal:
            for again in (keys, UP + b"\n"):
                terminal.wait_for(PROMPT)
                terminal.type(again)
                terminal.wait_for("(system prompt: Sail.)")
            terminal.wait_for(PROMPT)
            terminal.type(CTRL_D)
            assert terminal.wait_for_end() == 0


def test_answers_alone_go_where_standard_output_goes(checkpoint: Path, tmp_path: Path) -> None:
    with (
        open(tmp_path / "answers", "wb") as answers,
        open_terminal(
            "--model", str(checkpoint), "--max-tokens", "6", "--temp", "0", folder=tmp_path, answers=answers.fileno()
        ) as terminal,
    ):
        terminal.wait_for(PROMPT)
        terminal.type("Call me\n")
        terminal.wait_for("(cut off")
        terminal.wait_for(PROMPT)
        terminal.type("/quit\n")
        assert terminal.wait_for_end() == 0
    text = (tmp_path / "answers").read_text(encoding="utf-8")
    assert text.endswith("\n") and len(text) > 5 and not re.search(">>>|cut off|Type", text)


TOOL = '''
from typing import Literal

def measure(sea: Literal["Pacific"]) -> str:
    """Measures a sea.

    Args:
        sea: Which.
    """
    open("ran.txt", "a").close()
    return "4 km"
'''


def test_a_call_is_asked_about_and_ctrl_c_at_the_question_runs_nothing(tmp_path: Path) -> None:
    (tmp_path / "sea_tools.py").write_text(TOOL)
    arguments = ("--tools", "sea_tools:measure", "--tool-choice", "measure", "--temp", "0", "--max-tokens", "60")
    with open_terminal(*arguments, folder=tmp_path) as terminal:
        terminal.wait_for(PROMPT)
        terminal.type("How deep?\n")
        terminal.wait_for("Run measure(sea='Pacific')? [y/N] ")
        terminal.press_until(CTRL_C, HOW_TO_LEAVE)
        terminal.wait_for(PROMPT)
        assert not (tmp_path / "ran.txt").exists()
        terminal.type("How deep is it?\n")
        terminal.wait_for("Run measure(sea='Pacific')? [y/N] ")
        terminal.type("y\n")
        terminal.wait_for("(measure: 4 km)")
        terminal.wait_for(PROMPT)
        assert (tmp_path / "ran.txt").exists()
        terminal.type(CTRL_D)
        assert terminal.wait_for_end() == 0
