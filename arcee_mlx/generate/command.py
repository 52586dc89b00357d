"""`arcee-mlx generate` and `python -m arcee_mlx.generate`: arguments in, text on standard output.

Text goes to standard output as it is made; everything else (progress, statistics, errors) to standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..checkpoint.loading import DEMO_MODEL, load
from ..errors import InputError
from .answer import GenerationChunk
from .arguments import add_arguments, read_options
from .prefill import PromptProgress
from .request import Prompt
from .stream import stream_generate

__all__ = ["add_arguments", "run"]

DEMO_PROMPT = "Tell me about the sea."


def run(args: argparse.Namespace) -> int:
    """Runs `generate` as parsed; returns the exit status. Ctrl-C ends it with what was made, and 130."""
    options = read_options(args)
    text = _read_prompt(args)
    if args.raw and args.system_prompt is not None:
        raise InputError("--system-prompt with --raw: a raw prompt has no system message; leave one of them out")
    if args.model is None and not args.quiet:
        print(
            "No --model given: using the small bundled demo. For real work: --model arcee-ai/AFM-4.5B", file=sys.stderr
        )
    model, tokenizer = load(args.model or DEMO_MODEL, args.revision, args.dtype)
    prompt: Prompt = text
    if tokenizer.has_chat_template and not args.raw and text:
        system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
        prompt = [*system, {"role": "user", "content": text}]
    elif args.system_prompt is not None:
        raise InputError(
            "--system-prompt: this checkpoint has no chat template to put it into; make it part of the prompt"
        )
    progress = None if args.quiet else _prompt_progress()
    chunks = stream_generate(model, tokenizer, prompt, options, prompt_progress=progress)
    return _print_answer(chunks, args)


def _print_answer(chunks: Iterator[GenerationChunk], args: argparse.Namespace) -> int:
    texts: list[str] = []
    tokens: list[int] = []
    last: GenerationChunk | None = None
    interrupted = False
    try:
        for chunk in chunks:
            last = chunk
            texts.append(chunk.text)
            tokens.append(chunk.token)
            if not args.json and chunk.text:
                sys.stdout.write(chunk.text)
                sys.stdout.flush()
    except KeyboardInterrupt:
        interrupted = True
    if args.json:
        print(json.dumps(_as_json(texts, tokens, last, interrupted), ensure_ascii=False))
    else:
        print()
    if last is not None and not args.quiet:
        _print_stats(last, interrupted)
    return 130 if interrupted else 0


def _as_json(texts: list[str], tokens: list[int], last: GenerationChunk | None, interrupted: bool) -> dict[str, Any]:
    reason = "cancelled" if interrupted or last is None else last.stop_reason
    stats = {} if last is None else asdict(last.stats)
    return {"text": "".join(texts), "stop_reason": reason, "tokens": tokens, **stats}


def _print_stats(last: GenerationChunk, interrupted: bool) -> None:
    stats = last.stats
    print("==========", file=sys.stderr)
    print(f"Prompt: {stats.prompt_tokens} tokens, {stats.prompt_tokens_per_s:.1f} tokens/s, first token after "
          f"{stats.time_to_first_token_s:.3f} s", file=sys.stderr)  # fmt: skip
    print(f"Generation: {stats.generation_tokens} tokens, {stats.generation_tokens_per_s:.1f} tokens/s, ended by "
          f"{'Ctrl-C' if interrupted else last.stop_reason}, seed {stats.seed}", file=sys.stderr)  # fmt: skip
    print(f"Peak memory: {stats.peak_memory_bytes / 1e9:.3f} GB", file=sys.stderr)


def _prompt_progress() -> PromptProgress | None:
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bars: list[Any] = []

    def show(done: int, total: int) -> None:
        if not bars:
            bars.append(
                tqdm(total=total, desc="Reading the prompt", unit="token", file=sys.stderr, leave=False, delay=1)
            )
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    return show


def _read_prompt(args: argparse.Namespace) -> str:
    given = [name for name in ("prompt_words", "prompt", "prompt_file") if getattr(args, name) not in (None, [])]
    if len(given) > 1:
        raise InputError("the prompt is given twice; expected it as an argument, with --prompt or with --prompt-file")
    if args.prompt_file is not None:
        try:
            return args.prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--prompt-file {args.prompt_file}: cannot be read ({error}); expected UTF-8 text"
            ) from error
    text = args.prompt if args.prompt is not None else " ".join(args.prompt_words)
    if text == "-":
        return _read_stdin()
    if given:
        return text
    piped = "" if sys.stdin is None or sys.stdin.closed or os.isatty(sys.stdin.fileno()) else _read_stdin()
    if piped:
        return piped
    if not args.quiet:
        print(f"No prompt given: using {DEMO_PROMPT!r}", file=sys.stderr)
    return DEMO_PROMPT


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text ({error}); expected UTF-8") from error
