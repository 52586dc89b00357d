"""The owner thread of an engine: it alone loads, computes and frees; everything else sends it messages."""

from __future__ import annotations

import queue
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.config import ArceeConfig
from ..model.decoder import ArceeForCausalLM
from ..thread_end import wait_for_this_thread_at_exit
from .memory import MemoryBudget, make_budget
from .prefix_cache import PrefixCache
from .request import Request, closed_error, own_thread_error
from .scheduler import Scheduler

T = TypeVar("T")
Loader = Callable[[], tuple[ArceeForCausalLM, Tokenizer]]


@dataclass(frozen=True)
class OwnerSettings:
    """See `Engine.load`."""

    max_batch_size: int
    prefill_step_size: int
    memory_budget_bytes: int | None
    prefix_cache_bytes: int | None
    wired_limit_bytes: int | None


class Owner(threading.Thread):
    """The thread.

    Attributes, set when `loaded` is, and only read from then on:
        config, tokenizer: of the checkpoint.
        budget: for predictions.
        scheduler: for the thread itself, but for its `stats`.
    """

    config: ArceeConfig
    tokenizer: Tokenizer
    budget: MemoryBudget
    scheduler: Scheduler

    def __init__(self, load: Loader, settings: OwnerSettings) -> None:
        super().__init__(name="arcee_mlx-engine", daemon=True)
        self.loaded: Future[None] = Future()
        self._load: Loader | None = load
        self._settings = settings
        # Puts from finalizers must not wait for a lock that their own thread may hold: SimpleQueue's do not.
        self._inbox: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._door = threading.Lock()  # who puts a request in either sees that it is stopping, or is answered
        self._stopping = False
        self._wired_before: int | None = None

    # For any thread.

    @property
    def is_stopping(self) -> bool:
        """Whether it has been asked to stop, or has."""
        return self._stopping or not self.is_alive()

    def wake(self) -> None:
        """Has the loop turn once more."""
        self._inbox.put(None)

    def stop(self) -> None:
        """Asks for the end; `join` waits for it, for no more than a step or a chunk. Takes no lock: finalizers call it."""
        self._stopping = True
        self.wake()

    def find_place(self) -> str | None:
        """Where in its code it is now; None when it has ended."""
        frame = sys._current_frames().get(self.ident or 0) if self.is_alive() else None
        if frame is None:
            return None
        return f"line {frame.f_lineno} of {frame.f_code.co_name} in {frame.f_code.co_filename}"

    def submit(self, requests: list[Request]) -> None:
        """Puts requests in line, one behind the other.

        Raises: EngineClosedError.
        """
        with self._door:
            if self.is_stopping:
                raise closed_error()
            self._inbox.put(lambda: self.scheduler.submit(requests))

    def call(self, function: Callable[[], T]) -> T:
        """Runs a function on the owner thread, between two steps, and gives what it gives.

        Raises: EngineClosedError, or what the function raises; InputError on the owner thread itself.
        """
        if threading.current_thread() is self:
            raise own_thread_error()
        if self.is_stopping:
            raise closed_error()
        future: Future[T] = Future()

        def run() -> None:
            try:
                if self._stopping:
                    raise closed_error()
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._door:
            if self.is_stopping:
                raise closed_error()
            self._inbox.put(run)
        return future.result()

    # The thread.

    def run(self) -> None:
        """Loads, serves until it is told to stop, and frees."""
        wait_for_this_thread_at_exit()
        try:
            self._begin()
        except BaseException as error:
            self.loaded.set_exception(error)
            return
        self.loaded.set_result(None)
        try:
            while not self._stopping:
                self._read_inbox()
                self.scheduler.turn()
        finally:
            self._free()

    def _begin(self) -> None:
        assert self._load is not None
        model, self.tokenizer = self._load()
        self._load = None
        settings, self.config = self._settings, model.config
        weights = dict(tree_flatten(model.parameters()))
        self.budget = make_budget(
            model.config,
            weights_bytes=sum(array.nbytes for array in weights.values()),
            itemsize=model.model.norm.weight.dtype.size,
            prefill_step_size=settings.prefill_step_size,
            limit_bytes=settings.memory_budget_bytes,
        )
        room = self.budget.limit_bytes - self.budget.predict([])
        asked = settings.prefix_cache_bytes
        self.scheduler = Scheduler(
            model,
            self.tokenizer,
            self.budget,
            PrefixCache(max(0, room // 4 if asked is None else asked)),
            max_batch_size=settings.max_batch_size,
            prefill_step_size=settings.prefill_step_size,
        )
        if settings.wired_limit_bytes is not None:
            try:
                self._wired_before = mx.set_wired_limit(settings.wired_limit_bytes)
            except (RuntimeError, ValueError) as error:  # more than the system lets a process wire
                raise InputError(
                    f"wired_limit_bytes is {settings.wired_limit_bytes}; expected what this system allows ({error}); lower it"
                ) from error

    def _read_inbox(self) -> None:
        wait = not self.scheduler.has_work
        try:
            while not self._stopping:
                message = self._inbox.get(wait, self.scheduler.seconds_to_deadline if wait else None)
                wait = False
                if message is not None:
                    message()
                message = None  # while it waits it is to keep nothing in memory
        except queue.Empty:
            pass

    def _free(self) -> None:
        with self._door:
            self._stopping = True
        while not self._inbox.empty():
            if message := self._inbox.get():
                message()
        self.scheduler.fail_all(closed_error())
        if self._wired_before is not None:
            mx.set_wired_limit(self._wired_before)
        del self.scheduler
        mx.clear_cache()
