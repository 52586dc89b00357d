"""How every command that takes a prompt begins: its text, the model, and the two put together."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from ..checkpoint.loading import DEMO_MODEL, load
from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.decoder import ArceeForCausalLM
from .prefill import PromptProgress
from .request import Prompt

DEMO_PROMPT = "Tell me about the sea."


def name_model(args: argparse.Namespace) -> str | os.PathLike[str]:
    """The model that the arguments name, or the demo with a note."""
    if args.model is not None:
        return args.model
    if not args.quiet:
        print(
            "No --model given: using the small bundled demo. For real work: --model arcee-ai/AFM-4.5B", file=sys.stderr
        )
    return DEMO_MODEL


def open_model(args: argparse.Namespace) -> tuple[ArceeForCausalLM, Tokenizer]:
    """Loads the model that the arguments name."""
    return load(name_model(args), args.revision, args.dtype, adapter_path=args.adapter_path)


def open_draft_model(args: argparse.Namespace, tokenizer: Tokenizer) -> ArceeForCausalLM | None:
    """The draft model that the arguments name, its tokenizer compared with the model's; None without one."""
    if args.draft_model is None:
        return None
    draft_model, own = load(args.draft_model, None, args.dtype)
    if not own.shares_vocabulary(tokenizer):
        raise InputError(
            f"--draft-model {args.draft_model}: its tokenizer has another vocabulary; expected the model's; take a draft "
            f"model with the same tokenizer"
        )
    return draft_model


def make_prompt(args: argparse.Namespace, tokenizer: Tokenizer, text: str, *, goes_on: bool = False) -> Prompt:
    """The text as messages where there is a chat template for them; empty text only where a prompt goes on."""
    if tokenizer.has_chat_template and not args.raw and (text or goes_on):
        system = [] if args.system_prompt is None else [{"role": "system", "content": args.system_prompt}]
        return [*system, {"role": "user", "content": text}]
    if args.system_prompt is not None and not tokenizer.has_chat_template:
        raise InputError(
            "--system-prompt: this checkpoint has no chat template to put it into; make it part of the prompt"
        )
    return text


def show_progress(args: argparse.Namespace) -> PromptProgress | None:
    """A bar on standard error for a long prompt, where someone may be watching."""
    if args.quiet or not sys.stderr.isatty():
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


def read_prompt(args: argparse.Namespace, *, demo_prompt: bool = True) -> str:
    """The prompt's text, from wherever the arguments say it is.

    Args:
        demo_prompt: whether the demo model is asked something where nothing was given.
    """
    if args.raw and args.system_prompt is not None:
        raise InputError("--system-prompt with --raw: a raw prompt has no system message; leave one of them out")
    given = [name for name in ("prompt_words", "prompt", "prompt_file") if getattr(args, name) not in (None, [])]
    if len(given) > 1:
        raise InputError("the prompt is given twice; expected it as an argument, with --prompt or with --prompt-file")
    if args.prompt_file is not None:
        try:
            return args.prompt_file.read_text(encoding="utf-8").removesuffix("\n")
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
    if args.model is not None or not demo_prompt:
        raise InputError("no prompt was given; expected one as an argument, with --prompt, or on standard input")
    if not args.quiet:
        print(f"No prompt given: using {DEMO_PROMPT!r}", file=sys.stderr)
    return DEMO_PROMPT


def _read_stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text ({error}); expected UTF-8") from error
