"""Request: the caller's end of one answer that an engine makes. Safe on any thread; holds no MLX array."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from ..errors import EngineClosedError, InputError
from ..generate.answer import Answer, GenerationChunk, GenerationStats, join_chunks
from ..generate.options import StopReason
from ..generate.request import Request as CheckedRequest
from ..generate.sampling import LogitsProcessor

RequestState = Literal["queued", "prefilling", "generating", "done", "failed"]
OnEnd = Callable[[Answer | None], object]


class Request:
    """One answer in the making.

    Attributes:
        prompt_tokens: of the prompt.
        deadline_s: on `time.monotonic`'s clock; None for none.
    """

    def __init__(
        self,
        checked: CheckedRequest,
        wake: Callable[[], object],
        owner: threading.Thread,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        buffer_chunks: int | None = None,
        may_wait: bool = True,
        on_end: OnEnd | None = None,
        engine: object = None,
    ) -> None:
        """Args: for the engine, which makes them.

        wake: called when the owner thread ought to look at this request; takes no lock.
        owner: that thread.
        deadline_s: from now.
        buffer_chunks: chunks made ahead of the reader at most; None for no reader, so that there is no limit.
        may_wait: for memory.
        on_end: called once on the owner thread, before anybody learns of the end, with the answer, or None where there
            is none because the request failed; whether anybody reads it or not. It must not block.
        engine: what is to live until the end of this request, though nobody else hold it.
        """
        self.checked, self.logits_processors = checked, logits_processors
        self.buffer_chunks, self.may_wait = buffer_chunks, may_wait
        self.prompt_tokens = checked.unseen_tokens + len(checked.ids)
        self.started_s = time.perf_counter()
        self.deadline_s = None if deadline_s is None else time.monotonic() + deadline_s
        self.cancel_asked = False
        self._wake, self._owner, self._on_end, self._engine = wake, owner, on_end, engine
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._chunks: list[GenerationChunk] = []
        self._read = 0
        self._state: RequestState = "queued"
        self._answer: Answer | None = None
        self._error: BaseException | None = None
        self._listener: Callable[[], object] | None = None

    @property
    def state(self) -> RequestState:
        """How far it is. "done" includes answers that were cancelled or met their deadline: see `stop_reason`."""
        return self._state

    @property
    def has_ended(self) -> bool:
        """Whether it is done or failed."""
        return self._state in ("done", "failed")

    def cancel(self) -> None:
        """Ends the answer before its next token, or its prompt before the next chunk; later calls do nothing.

        `result` then gives what was made, with stop_reason "cancelled". May be called from anywhere, finalizers included.
        """
        if not self.has_ended:
            self.cancel_asked = True  # no lock: a finalizer may run in a thread that holds it
            self._wake()

    def result(self, timeout_s: float | None = None) -> Answer:
        """Waits for the end and gives the whole answer.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes. Waiting ends, the request does not.

        Raises:
            TimeoutError: the answer is not complete yet.
            ArceeError: what it failed with.
            InputError: called in one of the engine's own calls, a logits processor for example, before the end.
        """
        self._check_can_wait()
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_ended, timeout_s):
                raise TimeoutError(f"the request is {self._state} after {timeout_s} s; wait longer, or cancel it")
            return self._take_answer()

    def next_chunk(self) -> GenerationChunk | None:
        """Waits for the next chunk no reader took; None at the end. See `result` for what it raises."""
        self._check_can_wait()
        with self._changed:
            self._changed.wait_for(self._has_news)
            return self._take_chunk()

    def next_chunk_now(self) -> GenerationChunk | None | Literal["not yet"]:
        """The same without waiting, for who comes back when there is news."""
        self._check_can_wait()
        with self._changed:
            return self._take_chunk() if self._has_news() else "not yet"

    def listen(self, listener: Callable[[], object] | None) -> None:
        """Has `listener` called on the owner thread whenever there is news; it must not raise, block or call back."""
        with self._changed:
            self._listener = listener

    def _has_news(self) -> bool:
        return self._read < len(self._chunks) or self.has_ended

    def _take_chunk(self) -> GenerationChunk | None:
        if self._read == len(self._chunks):
            self._take_answer()
            return None
        chunk = self._chunks[self._read]
        had_followed = self._has_followed()
        self._read += 1
        if self._has_followed() and not had_followed:
            self._wake()
        return chunk

    def _take_answer(self) -> Answer:
        if self._error is not None:
            raise self._error.with_traceback(None)  # or every call would add its frames
        assert self._answer is not None
        return self._answer

    def _has_followed(self) -> bool:
        return self.buffer_chunks is None or len(self._chunks) - self._read <= self.buffer_chunks // 2

    def _check_can_wait(self) -> None:
        self._check_process()
        if threading.current_thread() is self._owner and not self.has_ended:
            raise own_thread_error()

    def _check_process(self) -> None:
        if self._process != os.getpid():  # the engine's thread is not in this one
            raise closed_error()

    # From here on for the owner thread only.

    @property
    def reader_is_behind(self) -> bool:
        """Whether the reader has as many chunks to read as may wait for it."""
        with self._changed:
            return self.buffer_chunks is not None and len(self._chunks) - self._read >= self.buffer_chunks

    @property
    def reader_has_followed(self) -> bool:
        """Whether it has read half of them again, so that going on is worth its while."""
        with self._changed:
            return self._has_followed()

    @property
    def ended_early(self) -> StopReason | None:
        """Why it is to end now, if it is."""
        if self.cancel_asked:
            return "cancelled"
        return "deadline" if self.deadline_s is not None and time.monotonic() >= self.deadline_s else None

    def move_to(self, state: RequestState) -> None:
        """Says how far it is."""
        self._state = state

    def add(self, chunk: GenerationChunk) -> None:
        """Hands over the next chunk; one with a stop_reason is the last."""
        answer = None if chunk.stop_reason is None else join_chunks([*self._chunks, chunk], request=self.checked)
        if answer is not None:
            self._settle(answer)
        with self._changed:
            self._chunks.append(chunk)
            if answer is not None:
                self._answer, self._state = answer, "done"
                self._engine = None
            self._tell()

    def end(self, reason: StopReason) -> None:
        """Ends it early with what was made."""
        made = self._chunks
        if made:
            answer = join_chunks(made, reason, request=self.checked)
        else:
            whole, _, _ = self.checked.judge("")
            answer = Answer("", (), reason, self._no_stats(), is_complete=whole, schema=self.checked.options.schema)
        self._settle(answer)
        with self._changed:
            self._answer, self._state, self._engine = answer, "done", None
            self._tell()

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        with contextlib.suppress(BaseException):  # the hook's own failure comes second
            self._settle(None)
        with self._changed:
            self._error, self._state, self._engine = error, "failed", None
            self._tell()

    def _settle(self, answer: Answer | None) -> None:
        on_end, self._on_end = self._on_end, None  # once, and holding nothing of the caller's from then on
        if on_end is not None:
            on_end(answer)

    def _tell(self) -> None:
        self._changed.notify_all()
        if self._listener is not None:
            self._listener()

    def _no_stats(self) -> GenerationStats:
        seed = self.checked.options.seed
        assert seed is not None
        return GenerationStats(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=0,
            prompt_tokens_per_s=0.0,
            generation_tokens=0,
            generation_tokens_per_s=0.0,
            time_to_first_token_s=0.0,
            peak_memory_bytes=0,
            seed=seed,
        )


def check_deadline(deadline_s: float | None) -> None:
    """Raises InputError unless it is None or a positive number of seconds."""
    if deadline_s is None:
        return
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, int | float) or not 0 < deadline_s < 1e9:
        raise InputError(f"deadline_s is {deadline_s!r}; expected seconds over 0, or None")


def check_buffer(buffer_chunks: int) -> None:
    """Raises InputError unless it is a number of chunks."""
    if type(buffer_chunks) is not int or buffer_chunks < 1:
        raise InputError(f"buffer_chunks is {buffer_chunks!r}; expected an integer of at least 1")


def check_processors(logits_processors: Sequence[LogitsProcessor]) -> None:
    """Raises InputError unless it is a sequence of functions."""
    if not isinstance(logits_processors, Sequence):
        raise InputError(
            f"logits_processors is of type {type(logits_processors).__name__}; expected a sequence of functions"
        )
    for i, process in enumerate(logits_processors):
        if not callable(process):
            raise InputError(f"logits_processors[{i}] is of type {type(process).__name__}; expected a function")


def closed_error() -> EngineClosedError:
    """What every call to a closed engine, and every request it left unanswered, gets."""
    return EngineClosedError("the engine is closed; expected an open one; load another with Engine.load")


def own_thread_error() -> InputError:
    """What a call gets that would have the engine's thread wait for itself."""
    return InputError(
        "the engine's own thread, which calls logits processors, would wait for itself; expected a call that returns at once, "
        "or another thread; do not wait for an answer there"
    )
