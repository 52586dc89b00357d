"""`arcee-mlx doctor`: all is well on this machine; every planted fault is named and turns the exit status to 1."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from arcee_mlx.cli import main
from arcee_mlx.doctor import command, demo, kernels
from arcee_mlx.doctor.checks import Check, describe_error
from arcee_mlx.doctor.demo import Decoding
from arcee_mlx.doctor.kernels import Variant
from arcee_mlx.model.relu2 import down

NAMES = ["versions", "device", "memory", "disk", "environment", "kernels", "demo", "sparse"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products instead of all, and four tokens."""
    some = [Variant(path, mx.float32, 4, 64, 2, True) for path in ("gathered", "dense")]  # type: ignore[arg-type]
    monkeypatch.setattr(kernels, "list_variants", lambda on_gpu: some)
    prompt, stored = demo.read_stored()
    short = Decoding(stored.tokens[:4], stored.ids[:4], stored.logits[:4])
    monkeypatch.setattr(demo, "read_stored", lambda: (prompt, short))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached out to the network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked for a host"))
    for name in ("ARCEE_MLX_SPARSE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)


def test_a_sound_installation_is_well(
    few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert captured.err == "" and max(map(len, lines)) <= 80
    assert [line[:13].strip() for line in lines[:-2] if line[0] != " "] == NAMES
    assert lines[-1].startswith("All is well: what is installed fits together")
    assert "kernels were not run" in captured.out


def test_json_is_one_object_that_names_no_one(few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HOME", str(tmp_path / "jane"))
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    values = json.loads(out)
    assert list(values) == ["sound", "problems", "checks"] and values["sound"] is True and values["problems"] == []
    assert list(values["checks"]) == NAMES
    assert all(list(check) == ["sound", "problems", "facts"] for check in values["checks"].values())
    assert values["checks"]["environment"]["facts"]["HF_HOME"] is True
    for private in ("jane", str(Path.home()) + "/", str(Path.cwd()), socket.gethostname()):
        assert private not in out


def lose_a_row(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = down._find_active
    patch.setattr(down, "_find_active", lambda a: None if (active := find(a)) is None else active[1:])


def install_an_old_package(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = metadata.version
    patch.setattr(metadata, "version", lambda name: "0.31.9" if name == "mlx-lm" else version(name))


def damage_what_is_stored(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompt, stored = demo.read_stored()
    damaged = Decoding(stored.tokens, stored.ids[:, ::-1], stored.logits)
    patch.setattr(demo, "read_stored", lambda: (prompt, damaged))


def take_memory_away(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sysconf = os.sysconf
    patch.setattr(os, "sysconf", lambda name: 2**31 // sysconf("SC_PAGE_SIZE") if name == "SC_PHYS_PAGES" else sysconf(name))  # fmt: skip


def break_a_check(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> Check:
        raise OSError(f"{Path.home()}/jane/cache and /Volumes/Jane/x.json: no such device")

    patch.setitem(command.CHECKS, "disk", fail)


def set_a_variable(patch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    patch.setenv("ARCEE_MLX_SPARSE", "never")


@pytest.mark.parametrize(
    "plant, words",
    [
        (
            lose_a_row,
            ["1 of 2 products are wrong, the first: gathered", "leaving out the rows of zero neurons changes"],
        ),
        (install_an_old_package, ["mlx-lm is 0.31.9; expected >=0.32.2,<0.33; pip install 'mlx-lm>=0.32.2,<0.33'"]),
        (damage_what_is_stored, ["the demo model computes something else than it should: logits are off by"]),
        (take_memory_away, ["memory for models is 2.15 GB; expected"]),
        (break_a_check, ["disk: the check itself failed: OSError: cache and x.json: no such device; please report it"]),
        (set_a_variable, ["ARCEE_MLX_SPARSE is 'never'; expected off, on or auto"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_named_and_the_other_checks_go_on(
    few: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    plant: Callable[..., Any], words: list[str],
) -> None:  # fmt: skip
    plant(monkeypatch, tmp_path)
    assert main(["doctor", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["sound"] is False and len(values["problems"]) == len(words)
    for problem, expected in zip(values["problems"], words, strict=True):
        assert problem.startswith(expected)
    assert list(values["checks"]) == NAMES
    assert sum(not check["sound"] for check in values["checks"].values()) == len(words)


def test_what_needs_attention_is_counted_and_listed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        command, "CHECKS", {"one": lambda: Check({}, ("a",), ("a is b; expected c",)), "two": lambda: 1 / 0}
    )
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "2 things need attention:\n1. a is b; expected c\n2. two: the check itself failed: ZeroDivisionError" in out
    monkeypatch.setattr(command, "CHECKS", {"one": lambda: Check({}, ("a",), ("a is b; expected c",))})
    assert main(["doctor"]) == 1
    assert "\n1 thing needs attention:\n" in capsys.readouterr().out


def test_where_a_check_broke_down_is_told_without_folders(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "CHECKS", {"demo": demo.check_demo})
    monkeypatch.setattr(demo, "load", lambda *_, **__: 1 / 0)
    assert main(["doctor", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)["checks"]["demo"]["facts"]
    assert facts["error"] == "ZeroDivisionError: division by zero"
    assert facts["trail"][0].startswith("demo.py:") and facts["trail"][0].endswith(" check_demo")


@pytest.mark.parametrize(
    "text, told",
    [
        ("/Volumes/Data/x.json: damaged", "x.json: damaged"),
        ("'/Users/jane/models/x' is no folder", "'x' is no folder"),
        ("see https://github.com/a/b, 3 tokens/s", "see https://github.com/a/b, 3 tokens/s"),
        ("two\n  lines", "two lines"),
    ],
)  # fmt: skip
def test_errors_are_told_with_the_last_names_of_paths(text: str, told: str) -> None:
    assert describe_error(RuntimeError(text)) == told
