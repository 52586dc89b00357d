"""`arcee-mlx chat`: a conversation in a terminal; or over a pipe, lines in and answers out.

Answers go to standard output as they are made; everything else (prompts, notes, errors) to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ArceeError, InputError
from ..generate.arguments import (
    add_ending_arguments,
    add_memory_arguments,
    add_model_arguments,
    add_sampling_arguments,
    add_template_arguments,
    read_options,
)
from ..generate.opening import name_model
from .chat import Chat
from .engine import Engine

__all__ = ["add_arguments", "run"]

PROMPT = ">>> "
WELCOME = "Type a message. /help lists commands; Ctrl-C stops an answer, Ctrl-D leaves."
HOW_TO_LEAVE = "(Ctrl-D or /quit leaves)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `chat`; those that `generate` has, too, mean the same."""
    conversation = parser.add_argument_group("conversation")
    add_template_arguments(conversation)
    conversation.add_argument("--session", metavar="FILE", help="go on with a conversation that /save wrote")
    conversation.add_argument(
        "--overflow",
        choices=("refuse", "drop_oldest_turns"),
        help="what to do with a conversation longer than the model's context (default: refuse)",
    )
    conversation.add_argument(
        "--history-file", metavar="FILE", type=Path, help="keep typed lines for next time (default: in memory only)"
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_ending_arguments(parser)
    add_memory_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no notes on standard error")


def run(args: argparse.Namespace) -> int:
    """Runs `chat` as parsed; returns the exit status. A terminal is told of errors; a pipe ends with the first."""
    options = read_options(args)
    if args.session is not None and (args.system_prompt is not None or args.overflow is not None):
        raise InputError("--session with --system-prompt or --overflow: the file has its own; leave them out")
    at_terminal = sys.stdin.isatty()
    if args.history_file is not None and not at_terminal:
        raise InputError("--history-file without a terminal: nobody types; leave it out")
    model = name_model(args)
    with Engine.load(
        model,
        revision=args.revision,
        dtype=args.dtype,
        adapter_path=args.adapter_path,
        max_batch_size=1,
        prefill_step_size=args.prefill_step_size,
    ) as engine:
        if not engine.tokenizer.has_chat_template:
            raise InputError(
                f"{model} has no chat template; expected a model that was taught to chat; "
                f"for text that goes on from yours: arcee-mlx generate --model {model}"
            )
        if args.session is not None:
            session = engine.load_session(args.session)
        else:
            session = engine.session(args.system_prompt, overflow=args.overflow or "refuse")
        chat = Chat(engine, session, options, quiet=args.quiet)
        if at_terminal:
            if not args.quiet:
                print(WELCOME, file=sys.stderr)
            with _line_editing(args.history_file):
                _converse(chat)
        else:
            for line in _read_pipe():
                if not chat.take(line):
                    break
    return 0


def _converse(chat: Chat) -> None:
    go_on = True
    while go_on:
        try:
            go_on = chat.take(_ask())
        except KeyboardInterrupt:
            print(f"\n{HOW_TO_LEAVE}", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return
        except BrokenPipeError:
            raise
        except (ArceeError, OSError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)


def _ask() -> str:
    if sys.stdout.isatty():
        return input(PROMPT)
    print(PROMPT, end="", file=sys.stderr, flush=True)  # standard output is for answers
    return input()


def _read_pipe() -> Iterator[str]:
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise InputError(f"line {number} of standard input is not UTF-8 text ({error}); expected UTF-8") from error


@contextmanager
def _line_editing(history_file: Path | None) -> Iterator[None]:
    """Has `input` edit lines and remember them, where Python has readline; in a file only where one is given."""
    try:
        import readline
    except ImportError:
        if history_file is not None:
            raise InputError("--history-file: this Python has no readline; leave it out") from None
        yield
        return
    if history_file is not None and history_file.exists():
        readline.read_history_file(history_file)
    yield
    if history_file is not None:
        readline.write_history_file(history_file)
