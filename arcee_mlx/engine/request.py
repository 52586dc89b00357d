"""Request: the caller's end of one answer that an engine makes. Safe on any thread; holds no MLX array."""

from __future__ import annotations

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
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        buffer_chunks: int | None = None,
        may_wait: bool = True,
        engine: object = None,
    ) -> None:
        """Args: for the engine, which makes them.

        wake: called when the owner thread ought to look at this request; takes no lock.
        deadline_s: from now.
        buffer_chunks: chunks made ahead of the reader at most; None for no reader, so that there is no limit.
        may_wait: for memory.
        engine: what is to live until the end of this request, though nobody else hold it.
        """
        self.checked, self.logits_processors = checked, logits_processors
        self.buffer_chunks, self.may_wait = buffer_chunks, may_wait
        self.prompt_tokens = checked.unseen_tokens + len(checked.ids)
        self.started_s = time.perf_counter()
        self.deadline_s = None if deadline_s is None else time.monotonic() + deadline_s
        self.cancel_asked = False
        self._wake, self._engine = wake, engine
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
        """
        self._check_process()
        with self._changed:
            if not self._changed.wait_for(lambda: self.has_ended, timeout_s):
                raise TimeoutError(f"the request is {self._state} after {timeout_s} s; wait longer, or cancel it")
            return self._take_answer()

    def next_chunk(self) -> GenerationChunk | None:
        """Waits for the next chunk no reader took; None at the end. See `result` for what it raises."""
        self._check_process()
        with self._changed:
            self._changed.wait_for(self._has_news)
            return self._take_chunk()

    def next_chunk_now(self) -> GenerationChunk | None | Literal["not yet"]:
        """The same without waiting."""
        self._check_process()
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
        with self._changed:
            self._chunks.append(chunk)
            if chunk.stop_reason is not None:
                self._answer, self._state = join_chunks(self._chunks), "done"
                self._engine = None
            self._tell()

    def end(self, reason: StopReason) -> None:
        """Ends it early with what was made."""
        with self._changed:
            made = self._chunks
            self._answer = join_chunks(made, reason) if made else Answer("", (), reason, self._no_stats())
            self._state, self._engine = "done", None
            self._tell()

    def fail(self, error: BaseException) -> None:
        """Ends it with an error."""
        with self._changed:
            self._error, self._state, self._engine = error, "failed", None
            self._tell()

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


def closed_error() -> EngineClosedError:
    """What every call to a closed engine, and every request it left unanswered, gets."""
    return EngineClosedError("the engine is closed; expected an open one; load another with Engine.load")
