"""`arcee-mlx chat`: a conversation in a terminal; or over a pipe, lines in and answers out.

Answers go to standard output as they are made; everything else (prompts, notes, errors) to standard error.
"""

from __future__ import annotations

import argparse
import importlib
import operator
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
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
from .chat import NO, YES, Chat
from .engine import Engine
from .tool_loop import Functions, read_functions

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
    tools = parser.add_argument_group("tools")
    tools.add_argument(
        "--tools",
        dest="functions",  # the options of an answer hold what they are told of
        metavar="MODULE:FUNCTION,...",
        help="functions the model may call, from modules in this folder or installed; you are asked before each call",
    )
    tools.add_argument(
        "--tool-choice",
        dest="choice",
        metavar="CHOICE",
        help="whether an answer to you calls tools: auto, none, required, or the name of one (default: auto)",
    )
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    add_ending_arguments(parser)
    add_memory_arguments(parser)
    parser.add_argument("--quiet", action="store_true", help="no notes on standard error")


def run(args: argparse.Namespace) -> int:
    """Runs `chat` as parsed; returns the exit status. A terminal is told of errors; a pipe ends with the first."""
    options = read_options(args)
    functions = _import_functions(args.functions) if args.functions is not None else {}
    if args.choice is not None and not functions:
        raise InputError("--tool-choice without --tools: there is nothing to choose from; give both")
    options = replace(options, tools=tuple(functions.values()), tool_choice=args.choice or "auto")
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
        lines = _read_pipe()
        ask = _ask if at_terminal else partial(_ask_pipe, lines)
        chat = Chat(engine, session, options, quiet=args.quiet, functions=functions, ask=ask)
        if at_terminal:
            if not args.quiet:
                print(WELCOME, file=sys.stderr)
            with _line_editing(args.history_file):
                _converse(chat)
        else:
            for line in lines:
                if not chat.take(line):
                    break
    return 0


def _converse(chat: Chat) -> None:
    go_on = True
    while go_on:
        try:
            go_on = chat.take(_ask(PROMPT))
        except KeyboardInterrupt:
            print(f"\n{HOW_TO_LEAVE}", file=sys.stderr)
        except EOFError:
            print(file=sys.stderr)
            return
        except BrokenPipeError:
            raise
        except (ArceeError, OSError, UnicodeDecodeError) as error:
            print(f"error: {error}", file=sys.stderr)


def _ask(question: str) -> str:
    if sys.stdout.isatty():
        return input(question)
    print(question, end="", file=sys.stderr, flush=True)  # standard output is for answers
    return input()


def _ask_pipe(lines: Iterator[str], question: str) -> str:
    """The next line answers; where there is none, no.

    Raises:
        InputError: it says neither yes nor no, and is perhaps the next message.
    """
    answer = next(lines, "")
    if answer.strip().lower() not in (*YES, *NO):
        raise InputError(
            f"{question}is answered {answer!r}; expected y or n on the line after a message that is answered by calls"
        )
    print(f"{question}{answer}", file=sys.stderr, flush=True)
    return answer


def _import_functions(names: str) -> Functions:
    functions = []
    sys.path.insert(0, os.getcwd())  # where `python -m` finds modules, too; and what they import later
    for name in names.split(","):
        module, _, function = name.strip().partition(":")
        try:
            functions.append(operator.attrgetter(function)(importlib.import_module(module)))
        except Exception as error:  # the module's own, too
            raise InputError(
                f"--tools names {name.strip()!r}, which cannot be imported ({type(error).__name__}: {error}); expected "
                f"MODULE:FUNCTION of a module in this folder or installed; check both names"
            ) from error
    return read_functions(functions)


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
