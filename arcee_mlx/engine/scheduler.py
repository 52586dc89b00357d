"""Scheduler: whose turn it is. One turn of its loop, on the owner thread: let requests end that are to; let waiting ones
in, in their order, while places and memory last; read one chunk of one prompt; make one token of every answer.

What fails in a request fails it alone. What fails in the batch fails all in it, and a new batch takes its place.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import mlx.core as mx

from ..checkpoint.tokenizer import Tokenizer
from ..checkpoint.training_state import hash_weights
from ..errors import ArceeError, DeviceError
from ..generate.prefill import fill_cache, make_prompt_cache
from ..model.decoder import ArceeForCausalLM
from .batch import Batch, step_alone
from .memory import MemoryBudget, RequestSize
from .prefix_cache import PrefixCache, kind_of
from .request import Request
from .rows import ActiveRow

CLEAR_STEPS = 256  # as mlx-lm


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
        self._waiting: dict[Request, RequestSize] = {}  # the first in line first
        self._prefilling: ActiveRow | None = None
        self._decoding: list[ActiveRow] = []
        self._paused: list[ActiveRow] = []
        self._batch = Batch(model)
        self._depends_on_length = model.model.rotary_emb.depends_on_length
        self._done = self._failed = 0
        self._prompt_tokens = self._computed_prompt_tokens = self._generated_tokens = self._decode_steps = 0

    @property
    def model(self) -> ArceeForCausalLM:
        """That computes."""
        return self._model

    @cached_property
    def weights_sha256(self) -> str:
        """Of the model, for files that belong to it."""
        return hash_weights(self._model.parameters())

    @property
    def prefix_room_bytes(self) -> int:
        """What beginnings of prompts may hold beside the requests that were let in."""
        free = self._budget.limit_bytes - self._budget.predict([row.size for row in self._rows()])
        return max(0, min(self.prefixes.limit_bytes, free))

    @property
    def has_work(self) -> bool:
        """Whether a turn would compute something."""
        can_resume = any(row.request.reader_has_followed for row in self._paused)
        return bool(self._decoding or self._prefilling or can_resume or self._size_of_next())

    @property
    def seconds_to_deadline(self) -> float | None:
        """Until a request is to end by itself that nothing is computed for."""
        requests = [*self._waiting, *(row.request for row in self._paused)]
        deadlines = [request.deadline_s for request in requests if request.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def submit(self, requests: list[Request]) -> None:
        """Puts requests in line, one behind the other; those that may not wait for memory fail if they would."""
        for request in requests:
            self._guard([], partial(self._put_in_line, request), request)

    def _put_in_line(self, request: Request) -> None:
        size = self._budget.measure(request.checked)
        if not request.may_wait:
            self._budget.check_beside(size, [*(row.size for row in self._rows()), *self._waiting.values()])
        self._waiting[request] = size

    def turn(self) -> None:
        """See the top of the file."""
        self._end_early()
        self._resume_and_pause()
        self._let_in()
        self._read_prompt()
        self._end_early()  # a chunk takes long, and the next step is not to begin after a cancel
        self._decode()
        if not self.has_work or self._decode_steps % CLEAR_STEPS == 0:
            self._guard([], mx.clear_cache)  # buffers of caches that have grown, which fit nothing any more

    def fail_all(self, error: BaseException) -> None:
        """Ends every request with an error, and lets go of all they hold."""
        for request in [*self._waiting, *(row.request for row in self._rows())]:
            self._fail(request, error)
        for row in self._rows():
            row.close()
        self._waiting.clear()
        self._prefilling, self._decoding, self._paused = None, [], []
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

    def _rows(self) -> list[ActiveRow]:
        return [*self._decoding, *self._paused, *([self._prefilling] if self._prefilling else [])]

    def _end_early(self) -> None:
        for request in [request for request in self._waiting if request.ended_early]:
            del self._waiting[request]
            self._guard([], partial(self._end, request), request)
        for row in [row for row in self._rows() if row.request.ended_early]:
            self._keep_answer(row)
            self._remove(row)
            self._guard([], partial(self._end, row.request), row.request)

    def _end(self, request: Request) -> None:
        if not request.has_ended:  # it may have failed with its batch meanwhile
            self._finish(partial(request.end, request.ended_early or "cancelled"))

    def _finish(self, tell: Callable[[], object]) -> None:
        """Counts a request as done before anybody learns of it, unless its own hook raises."""
        self._done += 1
        try:
            tell()
        except BaseException:
            self._done -= 1
            raise

    def _resume_and_pause(self) -> None:
        for row in [row for row in self._paused if row.request.reader_has_followed][: self._places]:
            self._paused.remove(row)
            self._guard([row], partial(self._start, row))
        for row in [row for row in self._decoding if row.request.reader_is_behind]:
            self._guard([row], partial(self._pause, row))

    def _pause(self, row: ActiveRow) -> None:
        if row.request.has_ended:  # it failed with its batch
            return
        if row.steps is None:
            row.cache = self._batch.extract(row)
        self._decoding.remove(row)
        self._paused.append(row)
        if row.steps is None:
            drawn: list[tuple[int, mx.array]] = []
            self._guard_batch(lambda: drawn.append(self._batch.leave(row)), row)
            for token, scores in drawn:
                self._take(row, token, scores)

    def _let_in(self) -> None:
        if size := self._size_of_next():
            request = next(iter(self._waiting))
            del self._waiting[request]
            self._guard([], partial(self._open, request, size), request)

    @property
    def _places(self) -> int:
        return max(0, self._max_batch_size - len(self._decoding) - bool(self._prefilling))

    def _size_of_next(self) -> RequestSize | None:
        """What the first in line takes, if it may come in now."""
        if not self._waiting or self._prefilling or not self._places:
            return None
        size = next(iter(self._waiting.values()))
        sizes = [row.size for row in self._rows()]
        # Alone it fits, which was checked when it came.
        fits = not sizes or self._budget.predict([*sizes, size]) <= self._budget.limit_bytes
        return size if fits else None

    def _make_room(self, *sizes: RequestSize) -> None:
        """Gives up prefixes that all rows, and these requests, leave no room for."""
        needed = self._budget.predict([*(row.size for row in self._rows()), *sizes])
        self.prefixes.shrink(max(0, self._budget.limit_bytes - needed))

    def _open(self, request: Request, size: RequestSize) -> None:
        self._make_room(size)
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
            count = min(row.unread_tokens, self._chunk_tokens(row.request))
            fill_cache(self._model, row.cache, row.ids[row.read_tokens : row.read_tokens + count], count)
            row.read_tokens += count
        if row.unread_tokens or row.request.ended_early:
            return
        if row.read_tokens > row.cached_tokens and not row.size.is_alone:
            with suppress(Exception):  # at worst a later prompt takes longer
                self._keep_prefix(row.ids[: row.read_tokens], row.cache)
        self._prefilling = None
        row.request.move_to("generating")
        self._start(row)

    def _chunk_tokens(self, request: Request) -> int:
        asked = request.checked.options.prefill_step_size
        # Where the rope's table depends on the length, its keys do on where the chunks end: as they would for `generate`.
        return asked if self._depends_on_length else min(asked, self._prefill_step_size)

    def _start(self, row: ActiveRow) -> None:
        if row.size.is_alone:
            row.steps = row.steps or step_alone(self._model, row)
        else:
            begun = self._batch.begin(row)
            self._guard_batch(partial(self._batch.join, row, begun), row)
        if not row.request.has_ended:
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

    def _take(self, row: ActiveRow, token: int, scores: mx.array) -> None:
        if row.request.has_ended:  # it failed meanwhile, with its batch
            return
        row.check()
        # The model computes NaN at once or never; a caller's processor may do so at any token.
        first = len(row.ids) == len(row.request.checked.ids)
        if (first or row.request.logits_processors) and not mx.isfinite(scores[token]).item():
            raise ArceeError("the model computes NaN; expected finite numbers; check its weights and processors")
        row.ids.append(token)
        chunk = row.row.add(token)
        self._generated_tokens += 1
        if chunk.stop_reason is None:
            row.request.add(chunk)
            return
        self._keep_answer(row)
        self._remove(row)
        self._finish(partial(row.request.add, chunk))

    def _keep_answer(self, row: ActiveRow) -> None:
        """Keeps the cache of a row that ended well, for prompts that go on from there."""
        if self.prefixes.limit_bytes and row.request.checked.options.max_kv_size is None:
            with suppress(Exception):  # at worst a later prompt takes longer
                in_batch = row.steps is None and row in self._decoding
                cache = self._batch.extract(row) if in_batch else row.cache
                self._keep_prefix(row.ids[: cache[0].offset], cache)

    def _keep_prefix(self, ids: list[int], cache: list[Any]) -> None:
        if not self._depends_on_length:  # its keys would be those of another prompt's length
            self.prefixes.insert(ids, cache)
            self._make_room()

    def _remove(self, row: ActiveRow) -> None:
        """Takes a row out of all lists and its batch, whatever it takes."""
        row.close()
        if row is self._prefilling:
            self._prefilling = None
        elif row in self._paused:
            self._paused.remove(row)
        elif row in self._decoding:
            self._decoding.remove(row)
            if row.steps is None:
                self._guard_batch(partial(self._batch.leave, row))

    def _guard(self, rows: list[ActiveRow], work: Callable[[], object], request: Request | None = None) -> None:
        """Does what concerns these rows, or this request, alone; what it raises ends them alone."""
        try:
            work()
        except BaseException as error:
            for row in rows:
                self._remove(row)
            for failed in [*(row.request for row in rows), *([request] if request else [])]:
                self._fail(failed, error)

    def _guard_batch(self, work: Callable[[], object], row: ActiveRow | None = None) -> None:
        """Does what concerns the batch; what it raises ends all rows in it, and this one, and a new one takes its place."""
        try:
            work()
        except BaseException as error:
            failed = [each for each in self._decoding if each.steps is None] + ([row] if row else [])
            self._decoding = [each for each in self._decoding if each.steps is not None]
            for each in failed:
                self._remove(each)
                self._fail(each.request, error)
            self._batch = Batch(self._model)  # last: should even that fail, they know

    def _fail(self, request: Request, error: BaseException) -> None:
        if not request.has_ended:
            self._failed += 1
            request.fail(_without_frames(_as_arcee_error(error)))


def _as_arcee_error(error: BaseException) -> BaseException:
    if isinstance(error, ArceeError):
        return error
    if isinstance(error, RuntimeError | MemoryError):  # what MLX raises for a device that failed or has no memory left
        wrapped: ArceeError = DeviceError(f"computing failed: {error}; the engine goes on with other requests")
    else:
        wrapped = ArceeError(f"computing failed with {type(error).__name__}: {error}; please report it")
    wrapped.__cause__ = error
    return wrapped


def _without_frames(error: BaseException) -> BaseException:
    """The same with its tracebacks as text: as frames they would keep the model in memory as long as the error is kept."""
    if error.__cause__ is not None and error.__cause__.__traceback__ is not None:
        error.add_note("On the engine's thread:\n" + "".join(traceback.format_exception(error.__cause__)))
    each: BaseException | None = error
    while each is not None:
        each.__traceback__, each = None, each.__cause__ or each.__context__
    return error
