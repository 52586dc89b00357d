"""bench grammar: tokens per second of answers held to a JSON schema against free ones: one, and 8 at once."""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace

from ..checkpoint.loading import DEMO_MODEL, load
from ..engine import Engine
from ..errors import InputError
from ..generate import Answer, GenerateOptions, generate_batch, stream_generate
from ..generate.answer import join_chunks
from .clock import add_clock_argument, read_clock

_PROMPTS = (
    "Tell me about the sea.", "The whale is", "Call me", "The state of the union", "Why do we work?", "Once upon a",
    "Who was the captain, and where did his ship go?", "We must, in the coming year, find a way to",
)  # fmt: skip
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 30},
        "born": {"type": "string", "format": "date"},
        "trade": {"enum": ["sailor", "farmer", "teacher"]},
        "children": {"type": "integer", "minimum": 0, "maximum": 20},
        "is_married": {"type": "boolean"},
    },
    "required": ["name", "born", "trade", "children", "is_married"],
    "additionalProperties": False,
}
# No answer is whole before the last token asked for.
_SCHEMA = {"type": "array", "items": _PERSON, "minItems": 10_000}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `run` takes what they parse to."""
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="alternating runs of each program (10)")
    parser.add_argument("--model", metavar="PATH", default=str(DEMO_MODEL), help="folder or hub id (default: the demo)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="for each answer (64)")
    add_clock_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Greedy answers of three programs, free and with the schema, in alternating runs."""
    if args.max_tokens < 1:
        raise InputError(f"--max-tokens is {args.max_tokens}; expected at least 1")
    clock = read_clock(args)
    model, tokenizer = load(args.model)
    free = GenerateOptions(max_tokens=args.max_tokens, temp=0, repetition_penalty=1.0)  # nothing touches the logits
    held = replace(free, schema=_SCHEMA)
    rates: dict[tuple[str, str], list[float]] = {}
    with Engine.load(args.model, prefix_cache_bytes=0) as engine:

        def answer_one(options: GenerateOptions) -> list[Answer]:
            return [join_chunks(list(stream_generate(model, tokenizer, _PROMPTS[0], options)))]

        def answer_batch(options: GenerateOptions) -> list[Answer]:
            return generate_batch(model, tokenizer, _PROMPTS, options)

        def answer_in_engine(options: GenerateOptions) -> list[Answer]:
            return [request.result() for request in [engine.submit(prompt, options) for prompt in _PROMPTS]]

        programs = {"one": answer_one, "8, batched": answer_batch, "8, engine": answer_in_engine}
        for number in range(args.runs + 1):  # the first only warms up, and compiles the grammar
            for name, answer in programs.items():
                for kind, options in (("schema", held), ("free", free)):
                    started_s = clock()
                    tokens = sum(len(made.tokens) for made in answer(options))
                    if number:
                        rates.setdefault((name, kind), []).append(tokens / (clock() - started_s))
    for (name, kind), values in rates.items():
        print(f"{f'{name}, {kind}':18s} median {statistics.median(values):.1f} tokens/s, {min(values):.1f} to "
              f"{max(values):.1f}, {args.runs} runs")  # fmt: skip
    for name in programs:
        ratio = statistics.median(rates[name, "schema"]) / statistics.median(rates[name, "free"])
        print(
            f"{name}: {ratio:.2f} (schema / free, answers of up to {args.max_tokens} tokens, their prompts read, too)"
        )
    return 0
