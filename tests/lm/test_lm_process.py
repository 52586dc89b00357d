"""The program as others meet it: its exit status, what it leaves of the process, and its server behind a real client."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from arcee_mlx.lm.command import COMMANDS, main

from lm_data import child_environment, free_ports, write_home

CHILD = """
import os, resource, sys
limits = [getattr(resource, name) for name in sorted(dir(resource)) if name.startswith("RLIMIT_")]
def state():
    return [resource.getrlimit(limit) for limit in limits], dict(os.environ), sys.argv, resource.setrlimit
before = state()
import arcee_mlx.lm
assert state() == before, "import"
assert sys.modules["mlx_lm.models.arcee"] is arcee_mlx.lm.model
import mlx_lm
assert state() == before, "import of mlx_lm after it"
from arcee_mlx.lm.command import main
assert main(["generate", "--model", sys.argv[1], "--prompt", "Call me", "--max-tokens", "3"]) == 0
assert state() == before, "generate"
try:
    main(["lora", "--model", sys.argv[1], "--data", "."])  # sets a variable of the environment, then has nothing to do
except ValueError:
    pass
else:
    raise AssertionError("nothing raised")
assert state() == before, "lora"
"""


def without_the_right_to_raise_limits() -> None:
    """In a child of root on Linux: what an ordinary user lacks (PR_CAPBSET_DROP and CAP_SYS_RESOURCE are both 24)."""
    if sys.platform == "linux" and os.getuid() == 0:
        assert ctypes.CDLL(None).prctl(24, 24, 0, 0, 0) == 0


def test_the_process_stays_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(checkpoint)],
        env=child_environment(HOME=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=without_the_right_to_raise_limits,
    )
    assert done.returncode == 0, done.stderr


def test_the_module_runs_without_a_warning(checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "arcee_mlx.lm", "generate", "--model", str(checkpoint), "-m", "3"],
        env=child_environment(HOME=str(tmp_path)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Generation: 3 tokens" in done.stdout, done.stderr


@pytest.mark.parametrize("arguments", [["sing"], ["manage"], ["--model", "x"]])
def test_an_unknown_command_is_status_2_and_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: command is {arguments[0]!r}; expected one of awq,") and error.count("\n") == 1


def test_help_and_no_command_list_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0 and main([]) == 2
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_without_a_model_is_refused_and_downloads_none(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--seed", "1"]) == 2
    assert "names no model; expected --model" in capsys.readouterr().err


def test_the_server_refuses_a_model_it_could_not_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["server", "--model", str(tmp_path / "empty"), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "config.json" in line


def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("arcee_mlx.lm.command.find_spec", lambda name: None)
    assert main(["evaluate", "--model", "x"]) == 2
    assert "lm_eval is not installed" in (error := capsys.readouterr().err) and "mlx-lm[evaluate]" in error


@pytest.mark.parametrize("command", ["convert", "server"])
def test_a_commands_own_help_is_mlx_lms(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and "--trust-remote-code" in capsys.readouterr().out


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`python -m arcee_mlx.lm server` at work."""
    folder = tmp_path_factory.mktemp("server")
    (port,) = free_ports(1)
    with open(folder / "log.txt", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "arcee_mlx.lm", "server", "--model", str(checkpoint), "--port", str(port)],
            env=child_environment(HOME=str(write_home(folder / "home"))),
            cwd=folder,
            stdout=log,
            stderr=log,
        )
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 100
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                log_text = (folder / "log.txt").read_text()
                assert server.poll() is None and time.monotonic() < deadline, log_text
                time.sleep(0.2)
        yield address
    finally:
        server.kill()
        server.wait()


def test_the_openai_client_talks_to_the_server(address: str) -> None:
    openai = pytest.importorskip("openai", reason="pip install openai")
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        assert len(client.models.list().data) == 1
        question = {"model": "default_model", "messages": [{"role": "user", "content": "Call me"}], "max_tokens": 6}
        answer = client.chat.completions.create(**question, temperature=0)
        assert answer.usage.completion_tokens == 6 and answer.choices[0].finish_reason == "length"
        with client.chat.completions.create(**question, temperature=0, stream=True) as chunks:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == answer.choices[0].message.content != ""
        completion = client.completions.create(model="default_model", prompt="Call me", max_tokens=4)
        assert completion.usage.completion_tokens == 4
