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
from pathlib import Path
from typing import Any

from ..checkpoint.loading import DEMO_MODEL, load
from ..errors import InputError
from .options import OPTION_NAMES, GenerateOptions
from .stream import GenerationChunk, Prompt, PromptProgress, stream_generate

DEMO_PROMPT = "Tell me about the sea."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `generate`; names are mlx_lm.generate's where it has them."""
    parser.add_argument("prompt_words", nargs="*", metavar="PROMPT", help="the prompt; '-' reads standard input")
    source = parser.add_argument_group("prompt")
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; '-' reads standard input")
    source.add_argument("--prompt-file", metavar="FILE", type=Path, help="read the prompt from a file")
    source.add_argument("--system-prompt", metavar="TEXT", help="system message for the chat template")
    source.add_argument(
        "--raw",
        "--ignore-chat-template",
        action="store_true",
        help="continue the prompt as it is, without chat template",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH|ID", help="checkpoint folder or Hugging Face Hub id (default: the demo)"
    )
    model.add_argument("--adapter-path", metavar="PATH|ID", help="LoRA or DoRA adapter to put on, mlx-lm's or PEFT's")
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    model.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16", "auto"),
        help="dtype to compute in (default: the checkpoint's on a GPU, float32 on the CPU backend)",
    )  # fmt: skip
    how = parser.add_argument_group("generation (defaults: the checkpoint's generation_config.json)")
    how.add_argument(
        "--max-tokens", "-m", type=int, metavar="N", help="tokens to make at most, -1 = all that fit (256)"
    )
    how.add_argument("--temp", "--temperature", type=float, metavar="T", help="temperature, 0 = likeliest token")
    how.add_argument("--top-p", type=float, metavar="P", help="sample within this probability mass, 1 = off")
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens, 0 = off")
    how.add_argument(
        "--min-p", type=float, metavar="P", help="leave out tokens under this share of the likeliest, 0 = off"
    )
    how.add_argument("--repetition-penalty", type=float, metavar="X", help="over prompt and answer, 1 = off")
    how.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: drawn)")
    how.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer at TEXT; repeatable")
    how.add_argument(
        "--extra-eos-token",
        dest="extra_eos_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens that end it too",
    )
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--max-kv-size", type=int, metavar="N", help="keep the first 4 and the newest tokens only, N in all"
    )
    memory.add_argument("--kv-bits", type=int, metavar="BITS", help="quantize the KV cache: 2, 4 or 8")
    memory.add_argument("--kv-group-size", type=int, default=64, metavar="N", help="group size of that (64)")
    memory.add_argument(
        "--prefill-step-size", type=int, default=2048, metavar="N", help="prompt tokens at a time (2048)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="one JSON object on standard output at the end, for programs"
    )
    output.add_argument("--quiet", action="store_true", help="no statistics, progress or notes on standard error")


def run(args: argparse.Namespace) -> int:
    """Runs `generate` as parsed; returns the exit status. Ctrl-C ends it with what was made, and 130."""
    options = GenerateOptions(**{name: getattr(args, name) for name in OPTION_NAMES})
    text = _read_prompt(args)
    if args.raw and args.system_prompt is not None:
        raise InputError("--system-prompt with --raw: a raw prompt has no system message; leave one of them out")
    if args.model is None and not args.quiet:
        print(
            "No --model given: using the small bundled demo. For real work: --model arcee-ai/AFM-4.5B", file=sys.stderr
        )
    model, tokenizer = load(args.model or DEMO_MODEL, args.revision, args.dtype, adapter_path=args.adapter_path)
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
