"""`arcee-mlx <command>`: the installed program. It parses, calls a room, and prints nothing of its own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from .program import open_missing_streams, run_reporting

COMMANDS = {
    "generate": ("arcee_mlx.generate.command", "write text with an Arcee model"),
    "chat": ("arcee_mlx.engine.chat_command", "talk with an Arcee model"),
    "cache-prompt": ("arcee_mlx.generate.cache_command", "read a long prompt once, for later answers"),
    "classify": ("arcee_mlx.tasks.classify_command", "find the label of each line of a text"),
    "tag": ("arcee_mlx.tasks.tag_command", "find labelled pieces, such as names, in each line of a text"),
    "answer": ("arcee_mlx.tasks.answer_command", "find the answer to a question in each line of a text"),
    "score": ("arcee_mlx.tasks.score_command", "find how likely each line of a text is, token by token"),
    "embed": ("arcee_mlx.tasks.embed_command", "turn each line of a text into a vector"),
    "convert": ("arcee_mlx.conversion.command", "convert a Hugging Face checkpoint to quantized MLX"),
    "inspect": ("arcee_mlx.inspection.command", "show what a checkpoint is, and what is odd about it or missing"),
    "eval": ("arcee_mlx.measure.eval_command", "measure perplexity, closeness to another checkpoint, lm-eval's tasks"),
    "sparsity": ("arcee_mlx.measure.sparsity_command", "show how many neurons are zero, and what that promises"),
    "bench": ("arcee_mlx.bench.command", "measure speed as a ratio against mlx-lm"),
    "doctor": ("arcee_mlx.doctor.command", "check that this installation is sound"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    open_missing_streams()
    parser = argparse.ArgumentParser(prog="arcee-mlx", description="Arcee's language models on Apple Silicon.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, description) in COMMANDS.items():
        command = import_module(module)
        sub = commands.add_parser(name, help=description, description=f"{description[0].upper()}{description[1:]}.")
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    args = parser.parse_args(argv)
    return run_reporting(lambda: args.run(args))
