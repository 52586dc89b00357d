"""`arcee-mlx chat` over a pipe: lines in, answers out, and what its commands do."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from arcee_mlx import Engine, GenerateOptions
from arcee_mlx.cli import main
from arcee_mlx.engine.chat import COMMANDS

Talk = Callable[..., tuple[int, str, str]]
GREEDY = ("--temp", "0", "--max-tokens", "6")


@pytest.fixture
def talk(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """Pipes text through the program; gives its exit status, what it answered, and what else it said."""

    def talk(text: str | bytes, *arguments: str, model: Path = checkpoint) -> tuple[int, str, str]:
        given = text.encode() if isinstance(text, str) else text
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
        status = main(["chat", "--model", str(model), *(arguments or GREEDY)])
        said = capsys.readouterr()
        return status, said.out, said.err

    return talk


def answer_lines(checkpoint: Path, *texts: str, system_prompt: str | None = None, **options: float) -> str:
    """What a session answers, as the program prints it."""
    with Engine.load(checkpoint) as engine:
        session = engine.session(
            system_prompt,
            options=GenerateOptions(**({"temp": 0, "max_tokens": 6} | options)),  # type: ignore[arg-type]
        )
        return "".join("".join(chunk.text for chunk in session.send(text)) + "\n" for text in texts)


def test_lines_go_in_and_answers_come_out_and_nothing_else(talk: Talk, checkpoint: Path) -> None:
    expected = answer_lines(checkpoint, "Call me", "Why?", system_prompt="Sail.")
    assert len(expected) > 10
    quiet = talk("Call me\r\n\n  \nWhy?", *GREEDY, "--quiet", "--system-prompt", "Sail.")
    assert quiet == (0, expected, "")


def test_what_was_cut_off_is_told(talk: Talk) -> None:
    assert "--max-tokens" in talk("Call me\n")[2]


def test_undo_takes_back_one_turn(talk: Talk, checkpoint: Path) -> None:
    status, answers, rest = talk("Call me\nSomething else\n/undo\nWhy?\n")
    first, _, third = (answers + "x").split("\n")[:3]
    assert status == 0 and f"{first}\n{third}\n" == answer_lines(checkpoint, "Call me", "Why?")
    assert "2 messages" in rest


@pytest.mark.parametrize("name", ["/again", "/regenerate"])
def test_another_answer_has_another_seed_and_takes_the_place_of_the_first(
    name: str, talk: Talk, checkpoint: Path
) -> None:
    options = ("--temp", "1", "--max-tokens", "6", "--seed", "5")
    answers, rest = talk(f"Call me\n{name}\n{name}\n/stats\n", *options)[1:]
    each = [answer_lines(checkpoint, "Call me", temp=1, seed=seed) for seed in (5, 6, 7)]
    assert answers == "".join(each) and len(set(each)) == 3
    assert "Conversation: 2 messages" in rest and "seed 7" in rest


def test_the_system_prompt_can_be_seen_changed_and_left_out(talk: Talk, checkpoint: Path) -> None:
    answers, rest = talk("/system\n/system Sail.\n/system\nCall me\n")[1:]
    assert answers == answer_lines(checkpoint, "Call me", system_prompt="Sail.") != answer_lines(checkpoint, "Call me")
    assert rest.count("(no system prompt)") == 1 and rest.count("(system prompt: Sail.)") == 2
    assert talk("/system Sail.\n/system -\nCall me\n")[1] == answer_lines(checkpoint, "Call me")
    assert "5 messages" in talk("Call me\n/system Sail.\nWhy?\n/stats\n")[2]


def test_a_saved_conversation_goes_on_with_load_and_with_the_option(
    talk: Talk, checkpoint: Path, tmp_path: Path
) -> None:
    file = str(tmp_path / "a talk.safetensors")
    saved = talk(f"Call me\n/save {file}\n")[1]
    whole = answer_lines(checkpoint, "Call me", "Why?")
    assert saved + talk("Why?\n", *GREEDY, "--session", file)[1] == whole
    other, _, rest = talk(f"Something else\n/load {file}\nWhy?\n/stats\n")[1].partition("\n")
    assert other and saved + rest == whole


def test_stats_and_help_go_to_standard_error(talk: Talk) -> None:
    status, answers, rest = talk("/stats\nCall me\n/stats\n/help\n/quit\nnever read\n", *GREEDY, "--quiet")
    assert status == 0 and answers.count("\n") == 1
    assert "no answer yet" in rest and "6 tokens" in rest and "prompt tokens were there already" in rest
    assert all(name in rest for name in COMMANDS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/sing\n", ("'/sing'", "/help")),
        ("/save\n", ("/save", "FILE")),
        ("/quit now\n", ("/quit", "'now'", "nothing")),
        ("/undo\n", ("0",)),
        ("/again\n", ("send a message first",)),
        ("/load nowhere.safetensors\n", ("nowhere.safetensors",)),
        (b"\n\xff\n", ("line 2", "UTF-8")),
    ],
)
def test_a_pipe_ends_with_the_first_mistake(text: str | bytes, words: tuple[str, ...], talk: Talk) -> None:
    status, answers, rest = talk(text if isinstance(text, bytes) else text + "Call me\n")
    assert (status, answers) == (2, "")
    (line,) = rest.splitlines()
    assert line.startswith("error: ") and all(word in line for word in words)


def test_a_space_before_it_makes_a_command_a_message(talk: Talk, checkpoint: Path) -> None:
    assert talk(" /quit\n")[1] == answer_lines(checkpoint, "/quit")


def test_a_model_that_does_not_chat_is_refused_with_advice(talk: Talk, checkpoint: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    status, answers, rest = talk("Call me\n", model=base)
    assert (status, answers) == (2, "")
    assert "no chat template" in rest and f"arcee-mlx generate --model {base}" in rest


def test_options_that_contradict_each_other_are_refused(talk: Talk) -> None:
    for arguments in (("--session", "f", "--system-prompt", "x"), ("--session", "f", "--overflow", "refuse"), ("--history-file", "h")):  # fmt: skip
        status, _, rest = talk("Call me\n", *arguments)
        assert status == 2 and rest.startswith(f"error: {arguments[0]}")


def test_a_conversation_that_is_too_long_is_refused_or_loses_its_oldest_turns(talk: Talk) -> None:
    lines = "Call me Ishmael, and call me often, and call me early.\n" * 12
    assert "256 positions" in talk(lines)[2]
    status, answers, _ = talk(lines, *GREEDY, "--overflow", "drop_oldest_turns")
    assert status == 0 and answers.count("\n") >= 12
