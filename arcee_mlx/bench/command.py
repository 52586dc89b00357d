"""`arcee-mlx bench BENCHMARK`: what the README quotes. Speed is always a ratio of two programs in one run."""

from __future__ import annotations

import argparse

from ..errors import InputError
from . import batch, convert, decode, grammar, speculative, startup
from .machine import describe_machine

_BENCHMARKS = {
    "startup": (startup, "from starting the process to the first text of the answer"),
    "batch": (batch, "many prompts at once against one by one"),
    "grammar": (grammar, "answers held to a JSON schema against free ones, one and 8 at once"),
    "speculative": (speculative, "one answer with drafts against without"),
    "convert": (convert, "converting a checkpoint: seconds, memory, closeness to the original"),
    "decode": (decode, "tokens/s without the zeros of squared ReLU, against dense decoding and mlx-lm's way"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds a subcommand for every benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module, description) in _BENCHMARKS.items():
        module.add_arguments(
            benchmarks.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
        )


def run(args: argparse.Namespace) -> int:
    """Runs a benchmark and prints its numbers on standard output; returns the exit status.

    Raises:
        ArceeError: an argument is out of range, or a program that is measured failed.
    """
    if args.runs is not None and args.runs < 1:
        raise InputError(f"--runs is {args.runs}; expected at least 1")
    machine = describe_machine()
    print(
        "  ".join(machine[name] for name in ("date", "platform", "chip", "memory", "device")),
        f" mlx {machine['mlx']}  BLAS {machine['blas']}",
        flush=True,
    )
    return _BENCHMARKS[args.benchmark][0].run(args)
