"""Measures a conversion beside mlx-lm's of the same checkpoint: seconds and peak memory, in alternation. Not a test.

    python tests/make_afm_shape.py /tmp/afm && python tests/conversion/measure_convert.py /tmp/afm [--runs 3]

Each run is a process of its own. mlx-lm has no arcee: a plain port of its Llama is given to it, and the rest is its
own code. Let the source lie in the page cache (read it once), or a slow disk is what is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def convert_ours(source: str, target: str) -> None:
    from arcee_mlx.conversion.run import convert

    convert(source, target)


def convert_mlx_lm(source: str, target: str) -> None:
    import mlx.nn as nn
    from mlx_lm import utils
    from mlx_lm.models import llama

    class MLP(nn.Module):
        def __init__(self, args):
            super().__init__()
            self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
            self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    class NoTokenizer:
        def save_pretrained(self, folder):
            pass

    def load(path, **_options):
        model, config = utils.load_model(Path(path), lazy=True)
        return model, NoTokenizer(), config

    convert_module = __import__("mlx_lm.convert", fromlist=["convert"])
    port = types.ModuleType("mlx_lm.models.arcee")
    port.Model, port.ModelArgs = llama.Model, llama.ModelArgs
    sys.modules["mlx_lm.models.arcee"] = port
    llama.MLP, convert_module.load, utils.create_model_card = MLP, load, lambda *_: None
    convert_module.convert(source, target, quantize=True, q_bits=4, q_group_size=64)


CONVERTERS = {"arcee_mlx": convert_ours, "mlx_lm": convert_mlx_lm}


def run_one(name: str, source: str) -> None:
    """In a process of its own: converts and prints what it took."""
    from arcee_mlx.conversion.report import peak_memory_bytes

    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        CONVERTERS[name](source, f"{folder}/out")
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "cpu_seconds": time.process_time(), "peak_gb": peak_memory_bytes() / 1e9}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure a conversion beside mlx-lm's.")
    parser.add_argument("source", help="checkpoint folder")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", choices=CONVERTERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.source)
        sys.exit()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONVERTERS}
    for _ in range(arguments.runs):
        for name in CONVERTERS:
            command = [sys.executable, __file__, arguments.source, "--one", name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    for name, runs in results.items():
        medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        print(name, "  ".join(f"{key} {value:.2f}" for key, value in medians.items()))
