"""bench speculative: tokens per second of `stream_generate` with drafts against without, on a text that repeats itself."""

from __future__ import annotations

import argparse
import statistics

from ..checkpoint.loading import DEMO_MODEL, load
from ..errors import InputError
from ..generate import Answer, GenerateOptions, stream_generate
from ..generate.answer import join_chunks

_TEXT = (
    "The harbour master keeps three books. In the first he writes the ships that come, in the second he writes the ships "
    "that go, and in the third he writes the ships that are late. The first book is blue, the second book is red, and the "
    "third book is black."
)
_PROMPT = f"{_TEXT}\n\nRepeat the text above word for word."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `run` takes what they parse to."""
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="alternating runs of each program (10)")
    parser.add_argument("--model", metavar="PATH", default=str(DEMO_MODEL), help="folder or hub id (default: the demo)")
    parser.add_argument("--draft-model", metavar="PATH", help="drafts come from it (default: from the text so far)")
    parser.add_argument("--num-draft-tokens", type=int, default=7, metavar="N", help="at a time, at most (7)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="of the answer (128)")


def run(args: argparse.Namespace) -> int:
    """One greedy answer with drafts and without, in alternating runs."""
    if args.max_tokens < 2:
        raise InputError(f"--max-tokens is {args.max_tokens}; expected at least 2, since the first is not timed")
    if args.num_draft_tokens < 1:
        raise InputError(f"--num-draft-tokens is {args.num_draft_tokens}; expected at least 1")
    model, tokenizer = load(args.model)
    draft_model = None if args.draft_model is None else load(args.draft_model)[0]
    prompt = [{"role": "user", "content": _PROMPT}] if tokenizer.has_chat_template else _PROMPT

    def answer(num_draft_tokens: int) -> Answer:
        options = GenerateOptions(
            max_tokens=args.max_tokens, temp=0, repetition_penalty=1.0, num_draft_tokens=num_draft_tokens
        )
        drafts = draft_model if num_draft_tokens else None
        return join_chunks(list(stream_generate(model, tokenizer, prompt, options, draft_model=drafts)))

    rates: dict[str, list[float]] = {"drafts": [], "plain": []}
    answers: dict[str, Answer] = {}
    for number in range(args.runs + 1):  # the first only warms up
        for name, drafted in (("drafts", args.num_draft_tokens), ("plain", 0)):
            answers[name] = answer(drafted)
            if number:
                rates[name].append(answers[name].stats.generation_tokens_per_s)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        print(
            f"{name:7s} median {medians[name]:.1f} tokens/s, {min(values):.1f} to {max(values):.1f}, {args.runs} runs"
        )
    stats = answers["drafts"].stats
    accepted = "no drafts" if stats.acceptance_rate is None else f"{stats.acceptance_rate:.0%} of the drafts accepted"
    same = "the same tokens" if answers["drafts"].tokens == answers["plain"].tokens else "NOT the same tokens"
    print(f"ratio   {medians['drafts'] / medians['plain']:.2f} (drafts / plain, {stats.generation_tokens} tokens, greedy): "
          f"{stats.tokens_per_step:.2f} tokens per pass, {accepted}; {same}")  # fmt: skip
    return 0
