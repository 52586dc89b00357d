"""bench batch: tokens per second of 8 answers at once, by `generate_batch` and by an `Engine`, against one by one."""

from __future__ import annotations

import argparse
import statistics
import time

from ..checkpoint.loading import DEMO_MODEL, load
from ..engine import Engine
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
    """8 greedy answers by each program, in alternating runs."""
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens is {args.max_tokens}; expected at least 1")
    model, tokenizer = load(args.model)
    options = GenerateOptions(max_tokens=args.max_tokens, temp=0)
    rates: dict[str, list[float]] = {}
    answers: dict[str, list[Answer]] = {}
    with Engine.load(args.model, prefix_cache_bytes=0) as engine:

        def one_by_one() -> list[Answer]:
            return [join_chunks(list(stream_generate(model, tokenizer, prompt, options))) for prompt in _PROMPTS]

        def engine_one_by_one() -> list[Answer]:
            return [engine.generate(prompt, options) for prompt in _PROMPTS]

        def engine_together() -> list[Answer]:
            return [request.result() for request in [engine.submit(prompt, options) for prompt in _PROMPTS]]

        programs = {
            "one by one": one_by_one,
            "batched": lambda: generate_batch(model, tokenizer, _PROMPTS, options),
            "engine, one by one": engine_one_by_one,
            "engine, together": engine_together,
        }
        for number in range(args.runs + 1):  # the first only warms up
            for name, program in programs.items():
                started_s = time.perf_counter()
                answers[name] = program()
                if number:
                    tokens = sum(len(answer.tokens) for answer in answers[name])
                    rates.setdefault(name, []).append(tokens / (time.perf_counter() - started_s))
    for name, values in rates.items():
        print(f"{name:18s} median {statistics.median(values):.1f} tokens/s, {min(values):.1f} to {max(values):.1f}, "
              f"{args.runs} runs")  # fmt: skip
    for many, one in (("batched", "one by one"), ("engine, together", "engine, one by one")):
        ratio = statistics.median(rates[many]) / statistics.median(rates[one])
        same = sum(a.tokens == b.tokens for a, b in zip(answers[many], answers[one], strict=True))
        print(f"{many} / {one}: {ratio:.2f} ({len(_PROMPTS)} answers of up to {args.max_tokens} tokens, their prompts "
              f"read, too); {same} of {len(_PROMPTS)} answers have the same tokens")  # fmt: skip
    return 0
