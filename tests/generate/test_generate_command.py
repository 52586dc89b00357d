"""`python -m arcee_mlx.generate` and `arcee-mlx generate`: what goes where, and how mistakes are answered."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import arcee_mlx
from arcee_mlx.cli import main
from arcee_mlx.generate.arguments import add_arguments
from arcee_mlx.generate.opening import read_prompt

from conftest import write_checkpoint

ARGUMENTS = ["--prompt", "Call me", "--max-tokens", "6", "--temp", "0"]


def generate(checkpoint: Path, *arguments: str) -> int:
    return main(["generate", "--model", str(checkpoint), *arguments])


def test_the_attribute_is_the_function_and_the_module_runs_without_a_warning(checkpoint: Path) -> None:
    assert callable(arcee_mlx.generate) and arcee_mlx.generate.__name__ == "generate"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "arcee_mlx.generate", "--model", str(checkpoint), *ARGUMENTS],
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.strip() and b"tokens/s" in done.stderr


def test_the_function_answers_twice_the_same(checkpoint: Path) -> None:
    model, tokenizer = arcee_mlx.load(checkpoint)
    options = arcee_mlx.GenerateOptions(max_tokens=6, temp=0)
    first = arcee_mlx.generate(model, tokenizer, "Call me", options)
    assert arcee_mlx.generate(model, tokenizer, "Call me", options) == first


def test_text_goes_to_standard_output_and_the_rest_to_standard_error(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(checkpoint, *ARGUMENTS) == 0
    loud = capsys.readouterr()
    assert generate(checkpoint, *ARGUMENTS, "--quiet") == 0
    quiet = capsys.readouterr()
    assert loud.out == quiet.out and quiet.err == ""
    for word in ("Prompt:", "Generation:", "tokens/s", "first token after", "Peak memory:"):
        assert word in loud.err


def test_json_is_one_object_and_nothing_else(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(checkpoint, *ARGUMENTS, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert generate(checkpoint, *ARGUMENTS) == 0
    assert answer["text"] == capsys.readouterr().out.removesuffix("\n")
    assert answer["stop_reason"] == "max_tokens" and len(answer["tokens"]) == answer["generation_tokens"] == 6


def test_the_chat_template_is_used_unless_raw(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts = []
    for extra in ((), ("--raw",), ("--system-prompt", "Be short.")):
        assert generate(checkpoint, *ARGUMENTS, "--json", *extra) == 0
        counts.append(json.loads(capsys.readouterr().out)["prompt_tokens"])
    chat, raw, system = counts
    assert raw < chat < system


def test_the_prompt_comes_from_an_argument_a_file_or_standard_input(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt.txt").write_text("Call me")
    outputs = []
    for arguments in (["--prompt", "Call me"], ["Call", "me"], ["--prompt-file", str(tmp_path / "prompt.txt")], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Call me\n")))
        assert generate(checkpoint, *arguments, "--max-tokens", "6", "--temp", "0") == 0
        outputs.append(capsys.readouterr().out)
    assert len(set(outputs)) == 1


def test_piped_text_is_the_prompt_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    reader, writer = os.pipe()
    os.write(writer, "über\n".encode())
    os.close(writer)
    with os.fdopen(reader) as pipe:
        monkeypatch.setattr(sys, "stdin", pipe)
        assert read_prompt(parser.parse_args([])) == "über"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x", "--temp", "-1"], "temp is -1.0; expected"),
        (["--prompt", "x", "--top-p", "2"], "top_p is 2.0; expected"),
        (["--prompt", "x", "--kv-bits", "8", "--max-kv-size", "32"], "kv_bits together with max_kv_size"),
        (["--prompt", "x", "--kv-bits", "8"], "kv_group_size is 64"),
        (["--prompt", "x", "--raw", "--system-prompt", "y"], "--system-prompt with --raw"),
        (["--prompt", "x", "y"], "the prompt is given twice"),
        (["--prompt-file", "/nonexistent/file"], "--prompt-file"),
        (["--prompt", "word " * 400], "positions of the model"),
        (["--prompt", "x", "--extra-eos-token", "<nothing>"], "extra_eos_tokens names"),
        (["--prompt", "x", "--logit-bias", "five=1"], "--logit-bias is 'five=1'"),
        (["--prompt", "x", "--logit-bias", "400=1"], "logit_bias names the id 400"),
        (["--prompt", "x", "--chat-template-config", "{"], "--chat-template-config is not JSON"),
        (["--prompt", "x", "--chat-template-config", "[]"], "expected a JSON object"),
        (["--prompt", "x", "--raw", "--prefill-response", "y"], "prefill_response with a prompt that is not messages"),
        (["--prompt", "x", "--logprobs"], "--logprobs without --json"),
        (["--prompt", "x", "--xtc-threshold", "0.9"], "xtc_threshold is 0.9"),
        (["--prompt", "x", "-n", "0"], "-n is 0"),
        (["--prompt", "x", "-n", "2", "--temp", "0"], "n is 2 without a temperature"),
        (["--prompt", "x", "--num-beams", "3", "-n", "2"], "--num-beams with -n"),
        (["--prompt", "x", "--num-beams", "3", "--num-draft-tokens", "2"], "num_draft_tokens is 2 in a beam search"),
        (["--prompt", "x", "-n", "3", "--temp", "1", "--draft-model", "y"], "--draft-model with -n or --num-beams"),
        (["--prompt", "x", "--max-matching-ngram-size", "2"], "max_matching_ngram_size without num_draft_tokens"),
        (["--prompt", "x", "--num-beams", "3", "--temp", "1"], "temp is 1.0 in a beam search"),
        (["--prompt", "x", "--length-penalty", "2"], "--length-penalty without --num-beams"),
        (["--prompt", "x", "--prompt-cache-file", "/nonexistent/file"], "prompt cache file /nonexistent/file"),
    ],
)
def test_a_mistake_is_one_clear_line_and_status_2(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert generate(checkpoint, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and message in line


def answer_of(checkpoint: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert generate(checkpoint, *arguments, "--json", "--quiet") == 0
    return json.loads(capsys.readouterr().out)


def test_options_of_the_answer_reach_it(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = answer_of(checkpoint, capsys, *ARGUMENTS)
    biased = answer_of(checkpoint, capsys, *ARGUMENTS, "--logit-bias", "77=1e9", "--logit-bias", "78=5")
    assert set(biased["tokens"]) == {77}
    varied = answer_of(checkpoint, capsys, *ARGUMENTS, "--frequency-penalty", "9", "--presence-penalty", "9")
    assert varied["stop_reason"] == plain["stop_reason"] == "max_tokens"
    begun = answer_of(checkpoint, capsys, *ARGUMENTS, "--prefill-response", "Some years")
    assert begun["prompt_tokens"] > plain["prompt_tokens"]
    sampled = ["--prompt", "x", "--max-tokens", "20", "--temp", "1.5", "--seed", "1"]
    xtc = answer_of(checkpoint, capsys, *sampled, "--xtc-probability", "1", "--xtc-threshold", "0.05")
    assert xtc["tokens"] != answer_of(checkpoint, capsys, *sampled)["tokens"]


def test_drafts_are_counted_and_change_nothing(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "Call me Call me", "--max-tokens", "30", "--temp", "0"]
    plain = answer_of(checkpoint, capsys, *arguments)
    assert (plain["drafted_tokens"], plain["acceptance_rate"], plain["tokens_per_step"]) == (0, None, 1)
    ngrams = ["--num-draft-tokens", "5", "--max-matching-ngram-size", "1"]
    for extra, rate in ((ngrams, None), (["--draft-model", str(checkpoint)], 1)):
        answer = answer_of(checkpoint, capsys, *arguments, *extra)
        assert answer["text"] == plain["text"] and answer["drafted_tokens"] > 0
        assert answer["acceptance_rate"] == answer["accepted_tokens"] / answer["drafted_tokens"]
        assert rate is None or answer["acceptance_rate"] == rate
    assert answer["tokens_per_step"] > 3  # mlx_lm.generate's 3 drafts a pass, all accepted
    assert generate(checkpoint, *arguments, *extra) == 0
    assert (
        f"Drafts: {answer['accepted_tokens']} of {answer['drafted_tokens']} accepted (100%), "
        in capsys.readouterr().err
    )


def test_a_draft_model_with_another_tokenizer_is_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert generate(checkpoint, *ARGUMENTS, "--draft-model", str(other)) == 2
    assert "its tokenizer has another vocabulary; expected the model's" in capsys.readouterr().err


def test_logprobs_are_in_the_object(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = answer_of(checkpoint, capsys, *ARGUMENTS, "--logprobs", "--top-logprobs", "2")
    assert len(answer["logprobs"]) == len(answer["top_logprobs"]) == 6
    for token, logprob, (first, second) in zip(
        answer["tokens"], answer["logprobs"], answer["top_logprobs"], strict=True
    ):
        assert first == {"token": token, "logprob": logprob, "text": first["text"]}  # greedy
        assert second["logprob"] <= logprob < 0


def test_several_answers_are_printed_apart(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "Call me", "--max-tokens", "6", "--temp", "1", "--seed", "3", "-n", "3"]
    answers = answer_of(checkpoint, capsys, *arguments)["answers"]
    assert [answer["seed"] for answer in answers] == [3, 4, 5]
    assert generate(checkpoint, *arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "\n==========\n".join(answer["text"] for answer in answers) + "\n"
    assert "3 answers, 18 tokens, seeds from 3 on" in captured.err


def test_beams_are_printed_the_best_first(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "Call me", "--max-tokens", "6", "--num-beams", "4", "--num-return-sequences", "2"]
    first, second = answer_of(checkpoint, capsys, *arguments, "--early-stopping", "never")["answers"]
    assert first["score"] >= second["score"] and first["tokens"] != second["tokens"]
    assert generate(checkpoint, *arguments, "--length-penalty", "0.5") == 0
    captured = capsys.readouterr()
    assert captured.out.count("\n==========\n") == 1 and "Scores: -" in captured.err


def test_a_cached_prompt_gives_the_same_answer(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "cache.safetensors")
    cached = ["cache-prompt", "--model", str(checkpoint), "--prompt", "Call me", "--prompt-cache-file", file]
    assert main(cached) == 0
    assert f"{file}: " in capsys.readouterr().err
    for prompt in ("Call me", "Call me Ishmael."):
        arguments = ["--prompt", prompt, "--max-tokens", "6", "--temp", "0"]
        cold = answer_of(checkpoint, capsys, *arguments)
        warm = answer_of(checkpoint, capsys, *arguments, "--prompt-cache-file", file)
        assert warm["text"] == cold["text"] and cold["cached_tokens"] == 0
        assert warm["cached_tokens"] >= 4


def test_an_unknown_option_is_status_2(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        generate(checkpoint, "--no-such-option")
    assert stop.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"), "model.safetensors"),
        (lambda folder: os.truncate(folder / "model.safetensors", 5000), "download it again"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_line_and_status_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: object, message: str
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "model.safetensors.index.json").unlink()
    damage(folder)  # type: ignore[operator]
    assert generate(folder, *ARGUMENTS) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def start_a_million_tokens(folder: Path) -> subprocess.Popen[bytes]:
    write_checkpoint(folder / "m", max_position_embeddings=10**6)
    return subprocess.Popen(
        [sys.executable, "-m", "arcee_mlx.generate", "--model", str(folder / "m"), *ARGUMENTS, "--max-tokens", "-1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_ctrl_c_ends_cleanly_with_what_was_made(tmp_path: Path) -> None:
    process = start_a_million_tokens(tmp_path)
    assert process.stdout is not None
    first = process.stdout.read(1)  # there is text, so a million tokens are under way
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate()
    assert first and rest.endswith(b"\n")
    assert process.returncode == 130
    assert b"ended by Ctrl-C" in errors and b"Traceback" not in errors


def test_a_reader_that_goes_away_is_no_traceback(tmp_path: Path) -> None:
    process = start_a_million_tokens(tmp_path)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141 and b"Traceback" not in errors
