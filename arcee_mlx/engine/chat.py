"""Chat: what a line typed in `arcee-mlx chat` does. Answers go to standard output, all else to standard error."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx

from ..errors import InputError
from ..generate.options import GenerateOptions
from ..generate.stop import StopMatcher
from ..generate.tools import ToolCall, find_tool_format
from .answer_stream import AnswerStream
from .engine import Engine
from .session import Session
from .tool_loop import Functions, free_to_call, run_calls

COMMANDS = {
    "/help": ("", "this list"),
    "/again": ("", "another answer to your last message (also /regenerate)"),
    "/undo": ("", "take back your last message and its answer"),
    "/system": ("[TEXT]", "show what the model is told first, or tell it something else; '-' for nothing"),
    "/save": ("FILE", "save the conversation; FILE ends in .safetensors"),
    "/load": ("FILE", "go on with a saved one instead"),
    "/stats": ("", "tokens, speed, memory"),
    "/quit": ("", "leave (also /exit, Ctrl-D)"),
}
YES, NO = ("y", "yes"), ("n", "no", "")
MAX_TOOL_ROUNDS = 8
ALIASES = {"/regenerate": "/again", "/exit": "/quit"}
_ENDINGS = {
    "cancelled": "stopped",
    "max_tokens": "cut off: --max-tokens allows more, -1 as many as fit",
    "context_full": "cut off: the model's context is full; /undo makes room",
}


class Chat:
    """A conversation with an engine, line by line.

    Attributes:
        session: the conversation.
    """

    def __init__(
        self,
        engine: Engine,
        session: Session,
        options: GenerateOptions,
        *,
        quiet: bool = False,
        functions: Functions | None = None,
        ask: Callable[[str], str] = input,
    ) -> None:
        """Args:
        options: of every answer; with the tools that `functions` runs.
        quiet: no notes nobody asked for.
        functions: by the names that the model calls them by.
        ask: shows a question and gives what is typed; asked before each call.
        """
        self.session = session
        self._engine, self._options, self._quiet = engine, options, quiet
        self._functions, self._ask = functions or {}, ask
        self._tries = 0
        self._last_stats = "no answer yet"

    def take(self, line: str) -> bool:
        """Does what a line says; False when it says to leave. Ctrl-C in an answer stops the answer.

        Raises:
            ArceeError: it could not be done; the conversation is as it was.
        """
        if not line.startswith("/"):
            if text := line.strip():
                self._tries = 0
                self._converse(lambda: self.session.send(text, self._options))
            return True
        name, _, given = line.partition(" ")
        name, given = ALIASES.get(name, name), given.strip()
        if name not in COMMANDS:
            raise InputError(
                f"{name!r} is no command; expected one of {', '.join(COMMANDS)}; a space before it sends it"
            )
        wanted = COMMANDS[name][0]
        if (given and not wanted) or (wanted == "FILE" and not given):
            raise InputError(f"{name} is given {given!r}; expected {wanted or 'nothing'} after it")
        if name == "/quit":
            return False
        does: dict[str, Callable[[], None]] = {
            "/help": self._help,
            "/again": self._again,
            "/undo": self._undo,
            "/system": lambda: self._system(given),
            "/save": lambda: self._save(given),
            "/load": lambda: self._load(given),
            "/stats": self._stats,
        }
        does[name]()
        return True

    def _converse(self, start: Callable[[], AnswerStream]) -> None:
        """An answer, and where it calls tools that are to run, those to what they came to."""
        self._answer(start)
        for _ in range(MAX_TOOL_ROUNDS if self._functions else 0):
            if not (calls := self.session.pending_tool_calls):
                return
            results = run_calls(calls, self._functions, self._allows)
            for result in results:
                _tell(f"({result.name}: {result.content})")
            self._answer(partial(self.session.send, results, free_to_call(self._options)))
        if self._functions and self.session.pending_tool_calls:
            _tell(f"(after {MAX_TOOL_ROUNDS} answers with calls its calls are left alone; say how to go on)")

    def _allows(self, call: ToolCall) -> bool:
        return self._ask(f"Run {call}? [y/N] ").strip().lower() in YES

    def _answer(self, start: Callable[[], AnswerStream]) -> None:
        tools = self._options.tools
        before_calls = StopMatcher([find_tool_format(self._engine.tokenizer, tools).start] if tools else [])
        shown = 0
        with _ctrl_c_stops(start) as stream:
            try:
                for chunk in stream:
                    shown += _show(before_calls.add(chunk.text))
                shown += _show(before_calls.finish())
            finally:
                print(flush=True)
        answer = stream.request.result()
        if answer.stop_reason != "tool_call" and shown < len(answer.text):  # it began like a call and is none
            print(answer.text[shown:], flush=True)
        stats = answer.stats
        self._last_stats = (
            f"{stats.generation_tokens} tokens, {stats.generation_tokens_per_s:.1f} a second, seed {stats.seed}; "
            f"{stats.cached_tokens} of {stats.prompt_tokens} prompt tokens were there already"
        )
        if answer.stop_reason in _ENDINGS and not self._quiet:
            _tell(f"({_ENDINGS[answer.stop_reason]})")

    def _help(self) -> None:
        _tell("\n".join(f"{name + ' ' + given:15} {what}" for name, (given, what) in COMMANDS.items()))

    def _again(self) -> None:
        self._tries += 1
        options, seed = self._options, self._options.seed
        if seed is not None:  # the same one would give the same answer
            options = replace(options, seed=(seed + self._tries) % 2**64)
        if [message.role for message in self.session.messages[-2:-1]] == ["tool"]:
            options = free_to_call(options)
        self._converse(lambda: self.session.regenerate(options))

    def _undo(self) -> None:
        said = [message.role for message in self.session.messages if message.role in ("user", "assistant")]
        self.session.roll_back(max(1, said[::-1].index("user")) if "user" in said else 1)
        _tell(f"({len(self.session.messages)} messages are left)")

    def _system(self, text: str) -> None:
        before = self.session
        said = [message for message in before.messages if message.role != "system"]
        if text:
            prompt = None if text == "-" else text
            self.session = self._engine.session(prompt, messages=said, options=before.options, overflow=before.overflow)
        told = [message.content for message in self.session.messages if message.role == "system"]
        _tell(f"(system prompt: {told[0]})" if told else "(no system prompt)")

    def _save(self, file: str) -> None:
        self.session.save(file)
        _tell(f"(saved as {file})")

    def _load(self, file: str) -> None:
        self.session = self._engine.load_session(file)
        _tell(f"({len(self.session.messages)} messages)")

    def _stats(self) -> None:
        stats = self._engine.stats()
        _tell(
            f"Conversation: {len(self.session.messages)} messages\nLast answer: {self._last_stats}\n"
            f"Memory: {mx.get_active_memory() / 1e6:,.0f} MB in use, at most {stats.predicted_bytes / 1e6:,.0f} of "
            f"{stats.budget_bytes / 1e6:,.0f} MB"
        )


@contextmanager
def _ctrl_c_stops(start: Callable[[], AnswerStream]) -> Iterator[AnswerStream]:
    """Begins an answer; while the block lasts Ctrl-C cancels it and raises nothing, so that what was made is kept."""
    stream: AnswerStream | None = None
    pressed = False

    def stop(*_: object) -> None:
        nonlocal pressed
        pressed = True
        if stream is not None:
            stream.close()

    before = signal.signal(signal.SIGINT, stop)
    try:
        stream = start()
        if pressed:  # before there was anything to stop
            stream.close()
        yield stream
    finally:
        signal.signal(signal.SIGINT, before)


def _show(text: str) -> int:
    """Writes what is certain of an answer; gives its length."""
    sys.stdout.write(text)
    sys.stdout.flush()
    return len(text)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
