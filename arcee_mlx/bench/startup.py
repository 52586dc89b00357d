"""bench startup: from starting the process to the first byte of the answer, against mlx_lm.generate.

`python -m arcee_mlx.generate` on the bundled demo, and mlx-lm on a Llama of the same size, same tokenizer and same
quantization.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import upstream
from ..checkpoint.loading import DEMO_MODEL
from ..errors import ArceeError
from ..model.config import read_config

_PROMPT = "Tell me about the sea."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `run` takes what they parse to."""
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="alternating runs of each program (10)")


def run(args: argparse.Namespace) -> int:
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
