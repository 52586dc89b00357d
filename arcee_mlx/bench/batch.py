"""bench batch: tokens per second of `generate_batch` on 8 prompts against `stream_generate` on one after the other."""

from __future__ import annotations

import argparse
import statistics
import time

from ..checkpoint.loading import DEMO_MODEL, load
from ..errors import InputError
from ..generate import Answer, GenerateOptions, generate_batch, stream_generate
from ..generate.answer import join_chunks

_PROMPTS = (
    "Tell me about the sea.", "What is a whale?", "Call me", "The state of the union", "Why do we work?", "Once upon a",
    "Who was the captain, and where did his ship go?", "We must, in the coming year, find a way to",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `run` takes what they parse to."""
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="alternating runs of each program (10)")
    parser.add_argument("--model", metavar="PATH", default=str(DEMO_MODEL), help="folder or hub id (default: the demo)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="for each prompt (64)")


def run(args: argparse.Namespace) -> int:
    """8 greedy answers batched against one by one, in alternating runs."""
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens is {args.max_tokens}; expected at least 1")
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
