"""Scheduler: whose turn it is. One turn of its loop, on the owner thread: let requests end that are to; let waiting ones
in, in their order, while places and memory last; read one chunk of one prompt; make one token of every answer.

What fails in a request fails it alone. What fails in the batch fails all in it, and a new batch takes its place.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx

from ..checkpoint.tokenizer import Tokenizer
from ..errors import ArceeError, DeviceError, MemoryBudgetError
from ..generate.options import StopReason
from ..generate.prefill import fill_cache, make_prompt_cache
from ..generate.prompt_cache import hash_weights
from ..model.decoder import ArceeForCausalLM
from .batch import Batch, step_alone
from .memory import MemoryBudget, RequestSize
from .prefix_cache import PrefixCache, kind_of
from .request import Request
from .rows import ActiveRow


@dataclass(frozen=True)
class EngineStats:
    """What an engine did and holds.

    Attributes:
        queued, active: requests now.
        done, failed: requests so far.
        prompt_tokens: of all requests that were let in; computed_prompt_tokens of them were computed, the others came
            out of the prefix cache.
        generated_tokens, decode_steps: so far; their ratio is how many answers a step served.
        prefix_cache_bytes: held by beginnings of prompts.
        predicted_bytes: peak with all requests let in at full length.
        budget_bytes: for all.
    """

    queued: int = 0
    active: int = 0
    done: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_steps: int = 0
    prefix_cache_bytes: int = 0
    predicted_bytes: int = 0
    budget_bytes: int = 0


class Scheduler:
    """The requests of an engine, and what computes them.

    Attributes:
        prefixes: beginnings of prompts.
    """

    def __init__(
        self,
        model: ArceeForCausalLM,
        tokenizer: Tokenizer,
        budget: MemoryBudget,
        prefixes: PrefixCache,
        *,
        max_batch_size: int,
        prefill_step_size: int,
    ) -> None:
        """See `Engine.load`."""
        self.prefixes = prefixes
        self._model, self._tokenizer, self._budget = model, tokenizer, budget
        self._max_batch_size, self._prefill_step_size = max_batch_size, prefill_step_size
        self._waiting: deque[Request] = deque()
        self._prefilling: ActiveRow | None = None
        self._decoding: list[ActiveRow] = []
        self._paused: list[ActiveRow] = []
        self._batch = Batch(model)
        self._done = self._failed = 0
        self._prompt_tokens = self._computed_prompt_tokens = self._generated_tokens = self._decode_steps = 0

    @property
    def model(self) -> ArceeForCausalLM:
        """That computes."""
        return self._model

    @cached_property
    def weights_sha256(self) -> str:
        """Of the model, for files that belong to it."""
        return hash_weights(self._model)

    @property
    def prefix_room_bytes(self) -> int:
        """What beginnings of prompts may hold beside the requests that were let in."""
        free = self._budget.limit_bytes - self._budget.predict([row.size for row in self._rows()])
        return max(0, min(self.prefixes.limit_bytes, free))

    @property
    def has_work(self) -> bool:
        """Whether a turn would compute something."""
        return bool(self._decoding or self._prefilling or (self._waiting and not self._paused))

    @property
    def seconds_to_deadline(self) -> float | None:
        """Until a request is to end by itself that nothing is computed for."""
        requests = [*self._waiting, *(row.request for row in self._paused)]
        deadlines = [request.deadline_s for request in requests if request.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def submit(self, requests: list[Request]) -> None:
        """Puts requests in line, one behind the other; those that may not wait for memory fail if they would."""
        for request in requests:
            others = [
                *(row.size for row in self._rows()),
                *(self._measure(waiting) for waiting in self._waiting),
            ]
            try:
                if not request.may_wait:
                    self._budget.check_beside(self._measure(request), others)
                self._waiting.append(request)
            except MemoryBudgetError as error:
                self._fail(request, error)

    def turn(self) -> None:
        """See the top of the file."""
        self._end_early()
        self._resume_and_pause()
        self._let_in()
        self._read_prompt()
        self._decode()

    def fail_all(self, error: BaseException) -> None:
        """Ends every request with an error, and lets go of all they hold."""
        for request in [*self._waiting, *(row.request for row in self._rows())]:
            self._fail(request, error)
        self._waiting.clear()
        self._prefilling, self._decoding, self._paused = None, [], []
        self._batch = Batch(self._model)
        self.prefixes.shrink(0)

    def stats(self) -> EngineStats:
        """What stands now; for any thread, each number read on its own."""
        rows = self._rows()
        return EngineStats(
            queued=len(self._waiting),
            active=len(rows),
            done=self._done,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            computed_prompt_tokens=self._computed_prompt_tokens,
            generated_tokens=self._generated_tokens,
            decode_steps=self._decode_steps,
            prefix_cache_bytes=self.prefixes.held_bytes,
            predicted_bytes=self._budget.predict([row.size for row in rows], self.prefixes.held_bytes),
            budget_bytes=self._budget.limit_bytes,
        )

    def _measure(self, request: Request) -> RequestSize:
        return self._budget.measure(self._model.config, request.checked)

    def _rows(self) -> list[ActiveRow]:
        return [*self._decoding, *self._paused, *([self._prefilling] if self._prefilling else [])]

    def _end_early(self) -> None:
        for request in list(self._waiting):
            if reason := request.ended_early:
                self._waiting.remove(request)
                self._guard([], partial(self._end, request, reason), request)
        for row in self._rows():
            if reason := row.request.ended_early:
                self._remove(row, keep=True)
                self._guard([], partial(self._end, row.request, reason), row.request)

    def _end(self, request: Request, reason: StopReason) -> None:
        if request.state != "failed":  # with its batch, just now
            request.end(reason)
            self._done += 1

    def _resume_and_pause(self) -> None:
        for row in list(self._paused):
            if not row.request.reader_is_behind:
                self._paused.remove(row)
                self._guard([row], partial(self._start, row))
        for row in [row for row in self._decoding if row.request.reader_is_behind]:
            if row.steps is None:
                self._guard_batch(partial(self._pause, row))
            else:
                self._decoding.remove(row)
                self._paused.append(row)

    def _pause(self, row: ActiveRow) -> None:
        token = self._batch.leave(row, with_cache=True)
        self._decoding.remove(row)
        self._paused.append(row)
        self._guard([row], partial(self._take, row, token))

    def _let_in(self) -> None:
        while self._waiting and not self._prefilling and len(self._rows()) < self._max_batch_size:
            request = self._waiting[0]
            size = self._measure(request)
            sizes = [*(row.size for row in self._rows()), size]
            needed = self._budget.predict(sizes)
            self.prefixes.shrink(max(0, self._budget.limit_bytes - needed))
            if needed > self._budget.limit_bytes and len(sizes) > 1:
                return  # until a row ends; alone it fits, which was checked when it came
            self._waiting.popleft()
            self._guard([], partial(self._open, request, size), request)

    def _open(self, request: Request, size: RequestSize) -> None:
        checked = request.checked
        found = None
        if checked.options.max_kv_size is None:
            found = self.prefixes.fork(checked.ids, kind_of(checked.options))
        cache, cached = found or (make_prompt_cache(self._model, checked.options), 0)
        row = ActiveRow(request, self._model, self._tokenizer, size, cache, cached)
        self._prompt_tokens += len(checked.ids)
        self._computed_prompt_tokens += len(checked.ids) - cached
        request.move_to("prefilling")
        self._prefilling = row

    def _read_prompt(self) -> None:
        if row := self._prefilling:
            self._guard([row], partial(self._read_chunk, row))

    def _read_chunk(self, row: ActiveRow) -> None:
        if row.unread_tokens:
            step = min(self._prefill_step_size, row.request.checked.options.prefill_step_size)
            count = min(step, row.unread_tokens)
            fill_cache(self._model, row.cache, row.ids[row.read_tokens : row.read_tokens + count], count)
            row.read_tokens += count
        if row.unread_tokens:
            return
        if row.read_tokens > row.cached_tokens and not row.size.is_alone:
            self.prefixes.insert(row.ids[: row.read_tokens], row.cache)
        self._prefilling = None
        row.request.move_to("generating")
        self._start(row)

    def _start(self, row: ActiveRow) -> None:
        if row.size.is_alone:
            row.steps = row.steps or step_alone(self._model, row)
        else:
            self._guard_batch(partial(self._batch.join, row), row)
        if row.request.state == "generating":
            self._decoding.append(row)

    def _decode(self) -> None:
        made: list[tuple[ActiveRow, int, mx.array]] = []
        if len(self._batch):
            self._guard_batch(lambda: made.extend(self._batch.step()))
        for row in [row for row in self._decoding if row.steps is not None]:
            self._guard([row], partial(self._step_alone, row, made))
        self._decode_steps += bool(made)
        for row, token, scores in made:
            self._guard([row], partial(self._take, row, token, scores))

    def _step_alone(self, row: ActiveRow, made: list[tuple[ActiveRow, int, mx.array]]) -> None:
        assert row.steps is not None
        made.append((row, *next(row.steps)))

    def _take(self, row: ActiveRow, token: int, scores: mx.array | None = None) -> None:
        if row.request.state != "generating":  # it failed meanwhile, with its batch
            return
        if row.error is not None:
            raise row.error
        first = len(row.ids) == len(row.request.checked.ids)
        if first and scores is not None and bool(mx.isnan(scores[token])):
            raise ArceeError("the model computes NaN; expected finite numbers; check its weights and processors")
        row.ids.append(token)
        self._generated_tokens += 1
        chunk = row.row.add(token)
        if chunk.stop_reason is not None:
            self._remove(row, keep=True)
            self._done += 1
        row.request.add(chunk)

    def _remove(self, row: ActiveRow, *, keep: bool = False) -> None:
        """Takes a row out of all lists and its batch; its cache is kept for later prompts unless it failed."""
        keep = keep and row.request.checked.options.max_kv_size is None
        if row.steps is not None:
            row.steps.close()
        if row is self._prefilling:
            self._prefilling = None
        elif row in self._paused:
            self._paused.remove(row)
        else:
            self._decoding.remove(row)
            if row.steps is None:
                self._guard_batch(partial(self._batch.leave, row, with_cache=keep))
        if keep and row.cache:
            self.prefixes.insert(row.ids[: row.cache[0].offset], row.cache)

    def _guard(self, rows: list[ActiveRow], work: Callable[[], object], request: Request | None = None) -> None:
        """Does what concerns these rows, or this request, alone; what it raises ends them alone."""
        try:
            work()
        except BaseException as error:
            for row in rows:
                if row in self._rows():
                    self._remove(row)
            for failed in [*(row.request for row in rows), *([request] if request else [])]:
                self._fail(failed, error)

    def _guard_batch(self, work: Callable[[], object], joining: ActiveRow | None = None) -> None:
        """Does what concerns the batch; what it raises ends all rows in it, and a new one takes its place."""
        try:
            work()
        except BaseException as error:
            rows = [row for row in self._decoding if row.steps is None] + ([joining] if joining else [])
            self._decoding = [row for row in self._decoding if row.steps is not None]
            self._batch = Batch(self._model)
            for row in rows:
                self._fail(row.request, error)

    def _fail(self, request: Request, error: BaseException) -> None:
        if request.state in ("done", "failed"):
            return
        self._failed += 1
        request.fail(_as_arcee_error(error))


def _as_arcee_error(error: BaseException) -> BaseException:
    if isinstance(error, ArceeError):
        return error
    if isinstance(error, RuntimeError | MemoryError):  # what MLX raises for a device that failed or has no memory left
        wrapped: ArceeError = DeviceError(f"computing failed: {error}; the engine goes on with other requests")
    else:
        wrapped = ArceeError(f"computing failed with {type(error).__name__}: {error}; please report it")
    wrapped.__cause__ = error
    return wrapped
