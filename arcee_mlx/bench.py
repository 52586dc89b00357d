"""The benchmarks whose numbers the README quotes. Speed is always a ratio between two programs in one run.

`arcee-mlx bench startup`: from starting the process to the first byte of the answer, `python -m arcee_mlx.generate` on
the bundled demo against `mlx_lm.generate` on a Llama of the same size, same tokenizer and same quantization.

`arcee-mlx bench batch`: tokens per second of `generate_batch` on 8 prompts against `generate` on one after the other.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from . import upstream
from .checkpoint.loading import DEMO_MODEL, load
from .errors import ArceeError, InputError
from .generate import Answer, GenerateOptions, generate_batch, stream_generate
from .generate.answer import join_chunks
from .model.config import read_config

_PROMPT = "Tell me about the sea."
_PROMPTS = (
    "Tell me about the sea.", "What is a whale?", "Call me", "The state of the union", "Why do we work?", "Once upon a",
    "Who was the captain, and where did his ship go?", "We must, in the coming year, find a way to",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench`."""
    parser.add_argument("what", choices=("startup", "batch"), help="which benchmark")
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="alternating runs of each program (10)")
    parser.add_argument("--model", metavar="PATH", default=str(DEMO_MODEL), help="of batch (default: the demo)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of batch, a prompt (64)")


def run(args: argparse.Namespace) -> int:
    """Runs a benchmark and prints its numbers on standard output."""
    if args.runs < 1 or args.max_tokens < 1:
        raise InputError(f"--runs is {args.runs} and --max-tokens {args.max_tokens}; expected at least 1")
    print(f"{date.today()}  {platform.platform()}  {mx.default_device()}  mlx {version('mlx')}")
    return run_batch(args) if args.what == "batch" else run_startup(args)


def run_batch(args: argparse.Namespace) -> int:
    """8 greedy answers batched against one by one, in alternating runs."""
    model, tokenizer = load(args.model)
    options = GenerateOptions(max_tokens=args.max_tokens, temp=0)

    def one_by_one() -> list[Answer]:
        return [join_chunks(list(stream_generate(model, tokenizer, prompt, options))) for prompt in _PROMPTS]

    def batched() -> list[Answer]:
        return generate_batch(model, tokenizer, _PROMPTS, options)

    rates: dict[str, list[float]] = {"batched": [], "one by one": []}
    answers: dict[str, list[Answer]] = {}
    for number in range(args.runs + 1):  # the first only warms up
        for name, program in (("batched", batched), ("one by one", one_by_one)):
            started_s = time.perf_counter()
            answers[name] = program()
            if number:
                tokens = sum(len(answer.tokens) for answer in answers[name])
                rates[name].append(tokens / (time.perf_counter() - started_s))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(
            f"{name:10s} median {medians[name]:.1f} tokens/s, {min(values):.1f} to {max(values):.1f}, {args.runs} runs"
        )
    same = sum(a.tokens == b.tokens for a, b in zip(answers["batched"], answers["one by one"], strict=True))
    print(f"ratio      {medians['batched'] / medians['one by one']:.2f} (batched / one by one, {len(_PROMPTS)} answers of up "
          f"to {args.max_tokens} tokens, their prompts read, too); {same} of {len(_PROMPTS)} answers have the same tokens")  # fmt: skip
    return 0


def run_startup(args: argparse.Namespace) -> int:
    """From starting the process to the first byte of the answer, against mlx_lm.generate."""
    with tempfile.TemporaryDirectory() as folder:
        llama = write_llama_like_demo(Path(folder) / "llama")
        ours = [sys.executable, "-m", "arcee_mlx.generate", "--model", str(DEMO_MODEL), "--prompt", _PROMPT]
        theirs = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(llama), "--prompt", _PROMPT]
        times: dict[str, list[float]] = {"arcee_mlx": [], "mlx_lm": []}
        for number in range(args.runs + 1):  # the first of each only warms the disk cache
            for name, command in (("arcee_mlx", ours), ("mlx_lm", theirs)):
                seconds = _time_to_answer([*command, "--temp", "0", "--max-tokens", "8"])
                if number:
                    times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name:10s} median {medians[name]:.3f} s, {min(values):.3f} to {max(values):.3f} s, {args.runs} runs")
    print(f"ratio      {medians['arcee_mlx'] / medians['mlx_lm']:.3f} (arcee_mlx / mlx_lm, to the first text)")
    return 0


def write_llama_like_demo(folder: Path) -> Path:
    """A random Llama for mlx_lm with as many weights as the demo, its tokenizer and its quantization."""
    config = read_config(DEMO_MODEL)
    values = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size * 2 // 3,  # three matrices instead of two
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
    }
    llama = upstream.mlx_lm_module("models.llama")
    model = llama.Model(llama.ModelArgs.from_dict(values))
    model.set_dtype(mx.bfloat16)
    if config.quantization:
        table = {key: config.quantization[key] for key in ("group_size", "bits")}
        nn.quantize(model, **table)
        values["quantization"] = table
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (DEMO_MODEL / name).exists():
            shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


def _time_to_answer(command: Sequence[str]) -> float:
    """Seconds from starting the command to the first byte of its answer (after mlx_lm's line of ==)."""
    started_s = time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    seen = b""
    while (byte := process.stdout.read(1)) and (seen + byte).strip(b"=\n") == b"":
        seen += byte
    seconds = time.perf_counter() - started_s
    _, errors = process.communicate()
    if not byte or process.returncode:
        raise ArceeError(f"{' '.join(command)}: gave no answer (exit {process.returncode}): {errors.decode()[-500:]}")
    return seconds
