"""Session: a conversation with an engine, of which only what is new is computed.

It owns no keys and values: it keeps what was said and the tokens of it, and the engine's prefix cache finds what it still
has of them. So rolling back, editing and branching change a list, and what memory ran short of is computed again.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from ..errors import ArceeError, InputError, TokenizerError
from ..generate.answer import Answer
from ..generate.options import GenerateOptions
from ..generate.request import Prompt
from ..generate.sampling import LogitsProcessor
from ..generate.tools import ToolCall
from .answer_stream import AnswerStream, AsyncAnswerStream
from .owner import Owner
from .prefix_cache import kind_of
from .request import OnEnd, Request, check_buffer, closed_error
from .session_file import save_session
from .transcript import Draft, Message, Overflow, Said, Transcript, Turn

# From a session's turns to those that the next answer goes on from, and what it answers.
Choice = Callable[[tuple[Turn, ...]], tuple[tuple[Turn, ...], Said]]


class Submit(Protocol):
    """How a session hands a request to its engine."""

    def __call__(
        self,
        prompt: Prompt,
        options: GenerateOptions | None,
        logits_processors: Sequence[LogitsProcessor],
        deadline_s: float | None,
        wait: bool,
        buffer_chunks: int | None,
        on_end: OnEnd,
    ) -> Request: ...


class Session:
    """A conversation; `Engine.session` begins one. Every method may be called from any thread.

        session = engine.session("Answer in one sentence.")
        for chunk in session.send("Why is the sea salty?"):
            print(chunk.text, end="", flush=True)

    It makes one answer at a time. A turn, the user's message and the answer, is part of it from the end of the answer on,
    read to its end or not; of an answer that was cancelled or met its deadline, what was made of it is. What failed, was
    refused, or ended before its first text leaves the session as it was.
    """

    def __init__(self, owner: Owner, submit: Submit, transcript: Transcript) -> None:
        """For `Engine.session`."""
        if owner.tokenizer.chat_template is None:
            raise TokenizerError(
                "the checkpoint has no chat template; expected one for a session; give a base model plain text with "
                "Engine.stream or Engine.generate"
            )
        self._owner, self._submit = owner, submit
        self._lock = (
            threading.Lock()
        )  # held for no longer than it takes to look and to assign: the engine takes it, too
        self._transcript = transcript
        self._is_answering = False
        self._request: Request | None = None  # the last

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said, the oldest first, those the model no longer sees included."""
        return self._transcript.messages

    @property
    def pending_tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls in the last answer, which nobody has sent the results of; see `send`, and `run_tools`."""
        return self._transcript.pending_tool_calls

    @property
    def options(self) -> GenerateOptions | None:
        """For answers that are given none of their own."""
        return self._transcript.options

    @property
    def overflow(self) -> Overflow:
        """What happens where the context is full."""
        return self._transcript.overflow

    @property
    def dropped_turns(self) -> int:
        """How many of the oldest turns the model did not see when it made the last answer, the context being full."""
        turns = self._transcript.turns
        return turns[-1].dropped_turns if turns else 0

    def send(
        self,
        text: Said,
        options: GenerateOptions | None = None,
        *,
        deadline_s: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        buffer_chunks: int = 64,
    ) -> AnswerStream:
        """Answers a message of the user's, or what tools gave, piece by piece.

        Args:
            text: of the message; or the ToolResults of `pending_tool_calls`, one each, in their order. A message leaves
                those unanswered, which some chat templates refuse.
            options: instead of the session's.
            deadline_s, logits_processors, buffer_chunks: see `Engine.stream`.

        Raises:
            InputError: an answer is being made already (one that was cancelled is waited for), or an argument is not as described.
            ContextOverflowError: the prompt has more tokens than the model has positions. One that leaves fewer than
                max_tokens is answered up to the last position, where overflow is "refuse".
            TokenizerError: the chat template cannot render the messages.
            MemoryBudgetError, QueueFullError, EngineClosedError: see `Engine.submit`.
        """
        return AnswerStream(
            self._answer(lambda turns: (turns, text), options, deadline_s, logits_processors, buffer_chunks)
        )

    def asend(
        self,
        text: Said,
        options: GenerateOptions | None = None,
        *,
        deadline_s: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        buffer_chunks: int = 64,
    ) -> AsyncAnswerStream:
        """The same for `async for`. What `send` raises is raised when the first chunk is asked for."""
        if self._owner.is_stopping:  # in a forked process there is no thread that would find out
            raise closed_error()
        given = (options, deadline_s, logits_processors, buffer_chunks)
        return AsyncAnswerStream(lambda: self._answer(lambda turns: (turns, text), *given))

    def regenerate(
        self,
        options: GenerateOptions | None = None,
        *,
        deadline_s: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        buffer_chunks: int = 64,
    ) -> AnswerStream:
        """Makes the last answer anew; the new one takes its place when it has ended. See `send`."""

        def choose(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], Said]:
            if not turns:
                raise InputError("the session has no answer yet; expected one to make anew; send a message first")
            return turns[:-1], turns[-1].tool_results or turns[-1].user

        return AnswerStream(self._answer(choose, options, deadline_s, logits_processors, buffer_chunks))

    def edit(
        self,
        turn: int,
        text: Said,
        options: GenerateOptions | None = None,
        *,
        deadline_s: float | None = None,
        logits_processors: Sequence[LogitsProcessor] = (),
        buffer_chunks: int = 64,
    ) -> AnswerStream:
        """Answers another message in the place of an earlier one; when that has ended, all that followed is gone.

        Args:
            turn: which turn; 0 is the first. Each answer ends one, those that call tools included.

        See `send` for the rest.
        """

        def choose(turns: tuple[Turn, ...]) -> tuple[tuple[Turn, ...], Said]:
            if type(turn) is not int or not 0 <= turn < len(turns):
                raise InputError(f"turn is {turn!r}; expected one of the session's {len(turns)}, 0 the first")
            return turns[:turn], text

        return AnswerStream(self._answer(choose, options, deadline_s, logits_processors, buffer_chunks))

    def roll_back(self, turns: int = 1) -> None:
        """Drops the last turns; after a cancel it waits for that answer's end.

        Raises:
            InputError: there are not so many, or an answer is being made.
        """
        self._wait_for_cancelled()
        with self._lock:
            self._check_idle()
            before = self._transcript
            if type(turns) is not int or not 0 <= turns <= len(before.turns):
                raise InputError(f"turns is {turns!r}; expected at most the session's {len(before.turns)}")
            self._transcript = replace(before, turns=before.turns[: len(before.turns) - turns])

    def branch(self) -> Session:
        """Another session that goes on from here by itself; what both have in common is held once."""
        return Session(self._owner, self._submit, self._transcript)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the session to a .safetensors file, whole or not at all; `Engine.load_session` goes on with it.

        With it go its keys and values, as far as the engine still has them; what it has not is computed again when the
        session goes on, so that saving neither waits for other requests nor holds them up. An answer that is being made is
        no part of it yet.

        Raises:
            InputError: the name does not end in .safetensors, or the file cannot be written.
            EngineClosedError: the engine is closed.
        """
        save_session(path, self._transcript, self._owner)

    def _answer(
        self,
        choose: Choice,
        options: GenerateOptions | None,
        deadline_s: float | None,
        logits_processors: Sequence[LogitsProcessor],
        buffer_chunks: int,
    ) -> Request:
        check_buffer(buffer_chunks)
        self._wait_for_cancelled()
        with self._lock:
            self._check_idle()
            turns, text = choose(self._transcript.turns)
            before = self._transcript
            self._is_answering = True
        try:
            options = options or before.options or GenerateOptions()
            before = replace(before, turns=turns, cache_kind=kind_of(options))
            draft = before.draft(self._owner.tokenizer, self._owner.config, text, options)
            # What only messages may have is in the prompt already.
            options = replace(options, prefill_response=None, chat_template_config={})

            def settle(answer: Answer | None) -> None:
                self._settle(before, draft, answer)

            request = self._submit(draft.ids, options, logits_processors, deadline_s, True, buffer_chunks, settle)
            self._request = request
            return request
        except BaseException:
            self._is_answering = False
            raise

    def _settle(self, before: Transcript, draft: Draft, answer: Answer | None) -> None:
        """Called by the engine when an answer has ended, or failed."""
        after = None
        try:
            if answer is not None and (answer.text or answer.stop_reason not in ("cancelled", "deadline")):
                turn = draft.complete(self._owner.tokenizer, answer)
                after = replace(before, turns=(*before.turns, turn))
        finally:
            with self._lock:
                self._transcript = after or self._transcript
                self._is_answering = False

    def _wait_for_cancelled(self) -> None:
        """A cancelled answer ends with the step or chunk that is being computed: who goes on at once is not refused."""
        request = self._request
        if request is not None and request.cancel_asked:
            with contextlib.suppress(ArceeError):
                request.result()

    def _check_idle(self) -> None:
        if self._is_answering:
            raise InputError(
                "the session is making an answer; expected one at a time; read or cancel that one first, or go on in a "
                "`branch`"
            )
