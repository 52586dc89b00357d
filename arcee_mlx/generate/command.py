"""`arcee-mlx generate` and `python -m arcee_mlx.generate`: arguments in, text on standard output.

Text goes to standard output as it is made; everything else (progress, statistics, errors) to standard error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..checkpoint.tokenizer import Tokenizer
from ..errors import IncompleteAnswerError, InputError
from ..model.decoder import ArceeForCausalLM
from .answer import Answer, GenerationChunk, TokenLogprob, check_complete, join_chunks
from .arguments import add_arguments, read_options
from .batch import generate_answers
from .beam import Beam, beam_search
from .opening import make_prompt, open_draft_model, open_model, read_prompt, show_progress
from .options import GenerateOptions
from .prompt_cache import load_prompt_cache
from .request import Prompt
from .stream import stream_generate

__all__ = ["add_arguments", "run"]

_BEAM_ARGUMENTS = ("length_penalty", "early_stopping", "num_return_sequences")


def run(args: argparse.Namespace) -> int:
    """Runs `generate` as parsed; returns the exit status. Ctrl-C ends it with what was made, and 130."""
    options = read_options(args)
    text = read_prompt(args)
    _refuse_contradictions(args)
    model, tokenizer = open_model(args)
    cache = None
    if args.prompt_cache_file is not None:
        cache = load_prompt_cache(args.prompt_cache_file, model, tokenizer, model_name=args.model)
    goes_on = cache is not None and cache.ids is None
    if goes_on and args.system_prompt is not None:
        raise InputError("--system-prompt with a file of mlx_lm's: its prompt has begun already; leave it out")
    prompt = make_prompt(args, tokenizer, text, goes_on=goes_on)
    if args.num_beams > 1:
        return _print_beams(_search(args, model, tokenizer, prompt, options), args)
    if args.n > 1:
        answers = generate_answers(model, tokenizer, prompt, options, n=args.n, prompt_cache=cache)
        return _print_answers(answers, tokenizer, args)
    draft_model = open_draft_model(args, tokenizer)
    chunks = stream_generate(
        model,
        tokenizer,
        prompt,
        options,
        prompt_cache=cache,
        draft_model=draft_model,
        prompt_progress=show_progress(args),
    )
    return _print_answer(chunks, tokenizer, args)


def _refuse_contradictions(args: argparse.Namespace) -> None:
    if args.logprobs and not args.json:
        raise InputError("--logprobs without --json: there is no place for them in plain text; add --json")
    if args.n < 1 or args.num_beams < 1:
        raise InputError(f"-n is {args.n} and --num-beams {args.num_beams}; expected at least 1")
    if args.draft_model is not None and (args.n > 1 or args.num_beams > 1):
        raise InputError("--draft-model with -n or --num-beams: drafts are for one answer; leave one of them out")
    if args.num_beams > 1:
        if args.n > 1 or args.prompt_cache_file is not None:
            raise InputError("--num-beams with -n or --prompt-cache-file: a beam search does neither; leave it out")
    elif given := [name for name in _BEAM_ARGUMENTS if getattr(args, name) is not None]:
        raise InputError(f"--{given[0].replace('_', '-')} without --num-beams: expected it for a beam search only")


def _search(
    args: argparse.Namespace, model: ArceeForCausalLM, tokenizer: Tokenizer, prompt: Prompt, options: GenerateOptions
) -> list[Beam]:
    early_stopping = {None: False, "true": True, "false": False, "never": "never"}[args.early_stopping]
    return beam_search(
        model,
        tokenizer,
        prompt,
        options,
        num_beams=args.num_beams,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        early_stopping=early_stopping,  # type: ignore[arg-type]
        num_return_sequences=1 if args.num_return_sequences is None else args.num_return_sequences,
    )


def _print_answer(chunks: Iterator[GenerationChunk], tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    made: list[GenerationChunk] = []
    interrupted = False
    try:
        for chunk in chunks:
            made.append(chunk)
            if not args.json and chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    if not args.json:
        print()
    elif made:
        print(_dump(_as_json(join_chunks(made, "cancelled" if interrupted else None), tokenizer)))
    else:
        print(_dump({"text": "", "stop_reason": "cancelled", "tokens": []}))
    if made and not args.quiet:
        _print_stats(made[-1], interrupted)
    if interrupted:
        return 130
    return _say_incomplete([join_chunks(made)]) if made else 0


def _print_answers(answers: Sequence[Answer], tokenizer: Tokenizer, args: argparse.Namespace) -> int:
    if args.json:
        print(_dump({"answers": [_as_json(answer, tokenizer) for answer in answers]}))
    else:
        _print_texts([answer.text for answer in answers])
    if not args.quiet:
        tokens = sum(len(answer.tokens) for answer in answers)
        print(f"==========\n{len(answers)} answers, {tokens} tokens, seeds from {answers[0].stats.seed} on; peak memory "
              f"{answers[-1].stats.peak_memory_bytes / 1e9:.3f} GB", file=sys.stderr)  # fmt: skip
    return _say_incomplete(answers)


def _say_incomplete(answers: Sequence[Answer]) -> int:
    """The exit status."""
    try:
        for answer in answers:
            check_complete(answer.is_complete, answer.text, answer.stop_reason)
    except IncompleteAnswerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _print_beams(beams: Sequence[Beam], args: argparse.Namespace) -> int:
    if args.json:
        print(_dump({"answers": [asdict(beam) for beam in beams]}))
    else:
        _print_texts([beam.text for beam in beams])
    if not args.quiet:
        print("==========\nScores: " + ", ".join(f"{beam.score:.4f}" for beam in beams), file=sys.stderr)
    return 0


def _print_texts(texts: Sequence[str]) -> None:
    print("\n==========\n".join(texts))


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _as_json(answer: Answer, tokenizer: Tokenizer) -> dict[str, Any]:
    def readable(top: TokenLogprob) -> dict[str, Any]:
        return {**asdict(top), "text": tokenizer.decode([top.token])}

    values: dict[str, Any] = {"text": answer.text, "stop_reason": answer.stop_reason, "tokens": list(answer.tokens)}
    if answer.is_complete is not None:
        values["is_complete"] = answer.is_complete
    if answer.logprobs:
        values["logprobs"] = list(answer.logprobs)
    if answer.top_logprobs:
        values["top_logprobs"] = [[readable(top) for top in tops] for tops in answer.top_logprobs]
    stats = answer.stats
    rates = {"acceptance_rate": stats.acceptance_rate, "tokens_per_step": stats.tokens_per_step}
    return {**values, **asdict(stats), **rates}


def _print_stats(last: GenerationChunk, interrupted: bool) -> None:
    stats = last.stats
    print("==========", file=sys.stderr)
    print(f"Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tokens_per_s:.1f} tokens/s, first token after "
          f"{stats.time_to_first_token_s:.3f} s", file=sys.stderr)  # fmt: skip
    print(f"Generation: {stats.generation_tokens} tokens, {stats.generation_tokens_per_s:.1f} tokens/s, ended by "
          f"{'Ctrl-C' if interrupted else last.stop_reason}, seed {stats.seed}", file=sys.stderr)  # fmt: skip
    if stats.drafted_tokens:
        print(f"Drafts: {stats.accepted_tokens} of {stats.drafted_tokens} accepted ({stats.acceptance_rate:.0%}), "
              f"{stats.tokens_per_step:.2f} tokens per pass", file=sys.stderr)  # fmt: skip
    print(f"Peak memory: {stats.peak_memory_bytes / 1e9:.3f} GB", file=sys.stderr)
