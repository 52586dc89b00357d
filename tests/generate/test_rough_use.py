"""What apps and shells do to a program: threads, closed streams, strange numbers, broken weights."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import ArceeError, GenerateOptions, InputError
from arcee_mlx.cli import main

from conftest import write_checkpoint

GREEDY = GenerateOptions(max_tokens=6, temp=0)


def in_a_thread(function, *arguments):  # type: ignore[no-untyped-def]
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_one_thread_loads_and_another_generates(checkpoint: Path) -> None:
    here = arcee_mlx.generate(*arcee_mlx.load(checkpoint), "Call me", GREEDY)
    model, tokenizer = arcee_mlx.load(checkpoint)
    assert in_a_thread(arcee_mlx.generate, model, tokenizer, "Call me", GREEDY) == here
    model, tokenizer = in_a_thread(arcee_mlx.load, checkpoint)
    assert arcee_mlx.generate(model, tokenizer, "Call me", GREEDY) == here


def test_the_callers_stream_is_its_own_between_two_tokens(checkpoint: Path) -> None:
    model, tokenizer = arcee_mlx.load(checkpoint)
    before = mx.default_stream(mx.default_device())
    first, second = (arcee_mlx.stream_generate(model, tokenizer, "Call me", GREEDY) for _ in range(2))
    next(first)
    assert mx.default_stream(mx.default_device()) == before
    next(second)
    first.close()  # type: ignore[attr-defined]
    second.close()  # type: ignore[attr-defined]
    assert mx.default_stream(mx.default_device()) == before


def test_a_stream_may_be_closed_in_another_thread(checkpoint: Path) -> None:
    model, tokenizer = arcee_mlx.load(checkpoint)
    chunks = arcee_mlx.stream_generate(model, tokenizer, "Call me", GREEDY)
    next(chunks)
    in_a_thread(chunks.close)  # type: ignore[attr-defined]
    assert len(arcee_mlx.generate(model, tokenizer, "Call me", GREEDY)) > 0


@pytest.mark.parametrize("token", [400, 100_000, 2**40])
def test_an_end_of_text_id_the_model_does_not_have_touches_no_memory(tmp_path: Path, token: int) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, token]}))
    options = GenerateOptions(max_tokens=4, temp=1.0, xtc_probability=1.0, seed=0)
    assert arcee_mlx.generate(*arcee_mlx.load(tmp_path / "m"), "Call me", options)


def test_the_smallest_temperature_takes_the_likeliest(checkpoint: Path) -> None:
    loaded = arcee_mlx.load(checkpoint)
    expected = arcee_mlx.generate(*loaded, "Call me", GREEDY)
    for temp in (1e-5, 1e-39, 1e-320):
        assert arcee_mlx.generate(*loaded, "Call me", replace(GREEDY, temp=temp)) == expected


def test_weights_that_are_not_numbers_are_an_error_not_text(checkpoint: Path) -> None:
    model, tokenizer = arcee_mlx.load(checkpoint)
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, mx.nan)
    with pytest.raises(ArceeError, match="computes NaN"):
        arcee_mlx.generate(model, tokenizer, "Call me", GREEDY)
    with pytest.raises(ArceeError, match="computes NaN"):
        arcee_mlx.beam_search(model, tokenizer, "Call me", GREEDY, num_beams=2)


def test_a_prompt_cache_of_other_weights_is_refused(checkpoint: Path) -> None:
    model, tokenizer = arcee_mlx.load(checkpoint)
    cache = arcee_mlx.cache_prompt(model, tokenizer, "Call me Ishmael.")
    model.model.norm.weight = model.model.norm.weight * 2
    with pytest.raises(InputError, match="other weights"):
        arcee_mlx.generate(model, tokenizer, "Call me Ishmael. Some", GREEDY, prompt_cache=cache)


@pytest.mark.parametrize("prompt", [b"hello", None, 5, {"role": "user"}])
def test_a_prompt_of_another_type_is_refused(checkpoint: Path, prompt: object) -> None:
    with pytest.raises(InputError, match="prompt is of type"):
        arcee_mlx.stream_generate(*arcee_mlx.load(checkpoint), prompt)  # type: ignore[arg-type]


def test_numpy_ids_are_ids(checkpoint: Path) -> None:
    loaded = arcee_mlx.load(checkpoint)
    expected = arcee_mlx.generate(*loaded, [5, 6], GREEDY)
    for ids in (np.array([5, 6]), mx.array([5, 6]), [np.int64(5), np.int64(6)]):
        assert arcee_mlx.generate(*loaded, ids, GREEDY) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [{"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_a_filter_without_a_temperature_is_refused(checkpoint: Path, option: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(option))} without a temperature"):
        arcee_mlx.stream_generate(*arcee_mlx.load(checkpoint), "Call me", GenerateOptions(temp=0, **option))  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [51, -51, 1000, float("nan"), "1"])
def test_a_length_penalty_beyond_computing_is_refused(checkpoint: Path, penalty: float) -> None:
    with pytest.raises(InputError, match="length_penalty is"):
        arcee_mlx.beam_search(*arcee_mlx.load(checkpoint), "Call me", GREEDY, num_beams=2, length_penalty=penalty)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "", "--prompt", "x"], "hub id"),
        (["--prompt", "", "--system-prompt", "S"], "the prompt is empty"),
        (["--prompt", "x", "--stop", "\udcff"], "stop is"),
        (["--prompt", "x", "--chat-template-config", "[" * 100_000], "chat-template-config"),
    ],
)
def test_a_strange_argument_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--quiet", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def run_shell(line: str, checkpoint: Path) -> subprocess.CompletedProcess[bytes]:
    program = f'"{sys.executable}" -m arcee_mlx.generate --model "{checkpoint}" --max-tokens 3 --temp 0 '
    return subprocess.run(["sh", "-c", program + line], capture_output=True, check=False)


@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("--prompt hi --quiet <&-", 0, b""),
        ("--prompt - --quiet <&-", 2, b"error: the prompt is empty"),
        ("--prompt hi --quiet >&-", 0, b""),
        ("--prompt hi --json 2>&-", 0, b""),
        ("--quiet </dev/null", 2, b"error: no prompt was given"),
    ],
)
def test_closed_standard_streams_are_no_accident(checkpoint: Path, line: str, status: int, error: bytes) -> None:
    done = run_shell(line, checkpoint)
    assert done.returncode == status, done.stderr
    assert done.stderr.startswith(error) and b"Traceback" not in done.stderr
    if "--json" in line:
        assert json.loads(done.stdout)["stop_reason"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_output_is_one_clear_line(checkpoint: Path) -> None:
    done = run_shell("--prompt hi --quiet >/dev/full", checkpoint)
    assert done.returncode == 2 and done.stderr.startswith(b"error: ") and b"Traceback" not in done.stderr
