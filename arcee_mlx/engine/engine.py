"""Engine: a model inside an app. Every method may be called from any thread, and from asyncio.

One thread of the engine's own loads the model, computes, and frees it. Requests of all callers decode together, each with
its own options; what fails in one fails it alone.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx

from ..checkpoint.loading import load
from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError, QueueFullError
from ..generate.answer import Answer
from ..generate.options import GenerateOptions
from ..generate.request import Prompt, read_request
from ..generate.request import Request as CheckedRequest
from ..generate.sampling import LogitsProcessor
from ..model.config import ArceeConfig
from .answer_stream import AnswerStream, AsyncAnswerStream
from .owner import Owner, OwnerSettings
from .request import OnEnd, Request, check_buffer, check_deadline, check_processors, closed_error
from .scheduler import EngineStats, Scheduler
from .session import Session
from .session_file import load_session
from .transcript import Message, Overflow, begin

_owners: weakref.WeakSet[Owner] = weakref.WeakSet()


@atexit.register
def _stop_owners() -> None:
    """At the end of the program no engine computes on: a thread that does while Python goes away would crash it."""
    for owner in list(_owners):
        owner.stop()
    for owner in list(_owners):
        owner.join()


class Engine:
    """A loaded model that answers many callers at once.

        with Engine.load("afm-4.5b-4bit") as engine:
            print(engine.generate("The sea is", GenerateOptions(max_tokens=20)).text)

    An answer is what `stream_generate` gives for the same prompt, options and seed: alone the same text, whether its
    prompt was cached or not; beside others its scores differ by the order of float sums, and the text goes another way
    only where the two best tokens are closer than that.
    """

    def __init__(self, owner: Owner, most_requests: int) -> None:
        """For `load`."""
        self._owner, self._most_requests = owner, most_requests
        self._process = os.getpid()
        self._admission = threading.Lock()
        self._open_requests: weakref.WeakSet[Request] = weakref.WeakSet()
        # An engine nobody holds any more stops by itself when all requests have ended; no join here, since any thread may
        # collect garbage.
        weakref.finalize(self, owner.stop).atexit = False

    @classmethod
    def load(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        revision: str | None = None,
        dtype: mx.Dtype | str | None = None,
        adapter_path: str | os.PathLike[str] | None = None,
        max_batch_size: int = 8,
        max_queue: int = 64,
        prefill_step_size: int = 512,
        memory_budget_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        wired_limit_bytes: int | None = None,
    ) -> Engine:
        """Loads a model on a thread of its own and waits until it is there.

        Args:
            path_or_id, revision, dtype, adapter_path: see `arcee_mlx.load`.
            max_batch_size: answers made at once; further requests wait.
            max_queue: requests that may wait; one more is refused.
            prefill_step_size: prompt tokens computed between two steps of the other answers, and before a cancel is
                seen; a request's own prefill_step_size can lower it.
            memory_budget_bytes: for weights, keys and values, and what is copied in between. None: what MLX recommends
                for the device, or three quarters of the system's memory.
            prefix_cache_bytes: of that, for beginnings of prompts, which later prompts with the same beginning do not
                compute again; 0 for none. None: a quarter of what the weights leave.
            wired_limit_bytes: keep so much of MLX's memory from being paged out, while the engine is open. None leaves
                the process's limit alone.

        Raises:
            ArceeError: see `arcee_mlx.load`.
            InputError: a number is out of range.
            MemoryBudgetError: the weights do not fit the budget.
        """
        for name, value, least, may_be_none in (
            ("max_batch_size", max_batch_size, 1, False),
            ("max_queue", max_queue, 0, False),
            ("prefill_step_size", prefill_step_size, 1, False),
            ("prefix_cache_bytes", prefix_cache_bytes, 0, True),
            ("wired_limit_bytes", wired_limit_bytes, 0, True),
        ):
            if not (may_be_none and value is None) and (type(value) is not int or value < least):
                raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")
        settings = OwnerSettings(
            max_batch_size, prefill_step_size, memory_budget_bytes, prefix_cache_bytes, wired_limit_bytes
        )
        owner = Owner(lambda: load(path_or_id, revision, dtype, adapter_path=adapter_path), settings)
        _owners.add(owner)
        owner.start()
        try:
            owner.loaded.result()
        except BaseException:
            owner.stop()
            raise
        return cls(owner, max_batch_size + max_queue)

    @property
    def config(self) -> ArceeConfig:
        """Of the model."""
        return self._owner.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the checkpoint; safe on any thread."""
        return self._owner.tokenizer

    @property
    def is_closed(self) -> bool:
        """Whether it is closed, or closing."""
        return self._owner.is_stopping or self._process != os.getpid()

    def submit(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        wait: bool = True,
    ) -> Request:
        """Hands over a request and returns at once; its `result` is the answer.

        Args:
            prompt: text; or messages; or token ids, as in `arcee_mlx.generate`.
            options: None takes the checkpoint's generation_config.json throughout.
            logits_processors: functions (tokens so far (n,), logits (1, V)) -> logits (1, V), called on the engine's
                thread; what they raise, or what fails when it is computed, fails this request alone. Therefore its
                scores are computed at every step before the next begins, and no step of its batch overlaps another.
                Nothing survives an index far out of range, as in `mx.take`, nor `mx.linalg.eig` of NaN on the CPU.
            deadline_s: seconds from now after which the answer ends with what is made, its stop_reason "deadline".
            wait: False fails the request with MemoryBudgetError where it would wait for others to free their memory.

        Raises:
            InputError, TokenizerError: as `arcee_mlx.generate`; deadline_s is not positive.
            MemoryBudgetError: it would not fit the budget alone.
            QueueFullError: max_queue requests wait already.
            EngineClosedError: the engine is closed.
        """
        return self._submit_one(prompt, options, logits_processors, deadline_s, wait, None)

    def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        wait: bool = True,
    ) -> Answer:
        """Makes an answer and waits for it. Ctrl-C while it waits cancels it. See `submit`."""
        request = self.submit(prompt, options, logits_processors=logits_processors, deadline_s=deadline_s, wait=wait)
        return _wait_for([request])[0]

    def generate_answers(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        n: int,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        wait: bool = True,
    ) -> list[Answer]:
        """Samples n answers to one prompt; answer i is that of `generate` for the first answer's seed plus i.

        The prompt is computed once, for the others out of the prefix cache. See `submit`.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise InputError(f"n is {n!r}; expected an integer of at least 1")
        if n > self._most_requests:
            raise InputError(f"n is {n}; expected at most {self._most_requests}, max_batch_size and max_queue together")
        first = self._check(prompt, options, deadline_s)
        if n > 1 and first.options.temp == 0:
            raise InputError(f"n is {n} without a temperature: all answers would be the same; give temp over 0")
        seed = first.options.seed
        assert seed is not None
        each = [replace(first, options=replace(first.options, seed=(seed + i) % 2**64)) for i in range(n)]
        return _wait_for(self._submit(each, logits_processors, deadline_s, wait, None))

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        wait: bool = True,
        buffer_chunks: int = 64,
    ) -> AnswerStream:
        """Makes an answer piece by piece; letting go of the stream cancels it.

        Args:
            buffer_chunks: an answer so far ahead of its reader pauses until the reader follows.

        See `submit` for the rest.
        """
        check_buffer(buffer_chunks)
        return AnswerStream(self._submit_one(prompt, options, logits_processors, deadline_s, wait, buffer_chunks))

    def astream(
        self,
        prompt: Prompt,
        options: GenerateOptions | None = None,
        *,
        logits_processors: Sequence[LogitsProcessor] = (),
        deadline_s: float | None = None,
        wait: bool = True,
        buffer_chunks: int = 64,
    ) -> AsyncAnswerStream:
        """The same for `async for`. Nothing blocks the event loop; cancelling the task that waits cancels the request.

        What `submit` raises is raised when the first chunk is asked for.
        """
        check_buffer(buffer_chunks)
        self._check_open()
        given = (prompt, options, logits_processors, deadline_s, wait, buffer_chunks)
        return AsyncAnswerStream(lambda: self._submit_one(*given))

    def session(
        self,
        system_prompt: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, Any]] = (),
        options: GenerateOptions | None = None,
        overflow: Overflow = "refuse",
    ) -> Session:
        """Begins a conversation: messages in turns, of which only the new ones are computed.

        Args:
            system_prompt: what stands before all turns.
            messages: of a conversation so far, the user's and the assistant's in turns; a system message may be the first.
                After an answer with tool_calls, in OpenAI's form, tool messages may stand in the user's place.
            options: for answers that are given none of their own.
            overflow: where a prompt no longer fits the context: "refuse" raises ContextOverflowError, "drop_oldest_turns"
                leaves the oldest turns out of what the model sees.

        Raises:
            TokenizerError: the checkpoint has no chat template.
            InputError: messages or overflow are not as described.
            EngineClosedError: the engine is closed.
        """
        self._check_open()
        return Session(self._owner, self._submit_one, begin(system_prompt, messages, options, overflow))

    def load_session(self, path: str | os.PathLike[str]) -> Session:
        """Goes on with a session of `Session.save`, from this process or another, as if it had never ended.

        Raises:
            InputError: there is no such file, it is damaged or none of a session's, or it was made with other weights
                (adapters included), another tokenizer or another version of its format.
            TokenizerError: the checkpoint has no chat template.
            EngineClosedError: the engine is closed.
        """
        self._check_open()
        return Session(self._owner, self._submit_one, load_session(path, self._owner))

    def stats(self) -> EngineStats:
        """What it did and holds."""
        return self._scheduler().stats()

    def close(self, *, timeout_s: float | None = None) -> None:
        """Ends within one step or chunk: requests that have not ended fail with EngineClosedError, the memory is freed.

        May be called again, and from any thread. A logits processor that does not return keeps it waiting, and the end
        of the program, too, where Ctrl-C ends the wait.

        Args:
            timeout_s: seconds to wait at most; None for as long as it takes. Waiting ends, the engine is closing.

        Raises:
            TimeoutError: the engine's thread still runs.
        """
        self._owner.stop()
        if self._process == os.getpid() and threading.current_thread() is not self._owner:
            self._owner.join(timeout_s)
            if at := self._owner.find_place():
                raise TimeoutError(
                    f"the engine's thread is still at {at} after {timeout_s} s; expected the end of a step or a chunk; wait "
                    "longer, or have the logits processor return"
                )

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, prompt: Prompt, options: GenerateOptions | None, deadline_s: float | None) -> CheckedRequest:
        self._check_open()
        check_deadline(deadline_s)
        checked = read_request(self.config, self.tokenizer, prompt, options)
        if drafts := checked.options.num_draft_tokens:
            raise InputError(f"num_draft_tokens is {drafts} in an engine, which drafts nothing; leave it out")
        self._owner.budget.check_alone(checked)
        return checked

    def _submit_one(
        self,
        prompt: Prompt,
        options: GenerateOptions | None,
        logits_processors: Sequence[LogitsProcessor],
        deadline_s: float | None,
        wait: bool,
        buffer_chunks: int | None,
        on_end: OnEnd | None = None,
    ) -> Request:
        checked = self._check(prompt, options, deadline_s)
        return self._submit([checked], logits_processors, deadline_s, wait, buffer_chunks, on_end)[0]

    def _submit(
        self,
        each: Sequence[CheckedRequest],
        logits_processors: Sequence[LogitsProcessor],
        deadline_s: float | None,
        wait: bool,
        buffer_chunks: int | None,
        on_end: OnEnd | None = None,
    ) -> list[Request]:
        check_processors(logits_processors)
        if not isinstance(wait, bool):
            raise InputError(f"wait is {wait!r}; expected True or False")
        requests = [
            Request(
                checked,
                self._owner.wake,
                self._owner,
                logits_processors=tuple(logits_processors),
                deadline_s=deadline_s,
                buffer_chunks=buffer_chunks,
                may_wait=wait,
                on_end=on_end,
                engine=self,
            )
            for checked in each
        ]
        with self._admission:
            open_now = [request for request in self._open_requests if not request.has_ended]
            if len(open_now) + len(requests) > self._most_requests:
                raise QueueFullError(
                    f"{len(open_now)} requests are open; expected at most {self._most_requests}, max_batch_size and "
                    f"max_queue together, with the new ones; try again when some have ended"
                )
            self._owner.submit(requests)
            self._open_requests = weakref.WeakSet([*open_now, *requests])
        return requests

    def _scheduler(self) -> Scheduler:
        try:
            self._check_open()
            return self._owner.scheduler
        except AttributeError:  # it closed meanwhile
            raise closed_error() from None

    def _check_open(self) -> None:
        if self.is_closed:
            raise closed_error()


def _wait_for(requests: Sequence[Request]) -> list[Answer]:
    try:
        return [request.result() for request in requests]
    except BaseException:
        for request in requests:
            request.cancel()
        raise
