"""ActiveRow: a request that the owner thread computes, and what fails in it fails it alone."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import mlx.core as mx

from ..checkpoint.tokenizer import Tokenizer
from ..errors import ArceeError, CallbackError
from ..generate.row import Row
from ..model.decoder import ArceeForCausalLM
from .memory import RequestSize
from .request import Request


class ActiveRow:
    """What the owner thread has of a request.

    Attributes:
        ids: prompt and answer so far.
        cache: its own, one entry a layer, while it is in no batch.
        read_tokens: of the prompt, those that are in the cache.
        cached_tokens: of them, those that were there already.
        steps: its tokens, of a row that decodes alone.
        error: what its sampler or one of its processors raised.
        error_token: which token of the answer, from 0 on, it was to sample; steps run ahead of the tokens given.
    """

    def __init__(
        self,
        request: Request,
        model: ArceeForCausalLM,
        tokenizer: Tokenizer,
        size: RequestSize,
        cache: list[Any],
        cached_tokens: int,
    ) -> None:
        checked = request.checked
        self.request, self.size, self.cache = request, size, cache
        self.ids = list(checked.ids)
        self.read_tokens = self.cached_tokens = cached_tokens
        self.steps: Generator[tuple[int, mx.array]] | None = None
        self.error: BaseException | None = None
        self.error_token = self._sampled = 0
        self.row = Row(
            model,
            tokenizer,
            checked,
            request.logits_processors,
            request.started_s,
            hidden_tokens=len(self.ids) - 1 if size.is_alone else 0,  # what mlx-lm's step for one is not told of
            cached_tokens=cached_tokens,
        )
        self.sampler = None if self.row.is_plain else self._guard_sampler(self.row.sampler)
        self.processors = [self._process] if self.row.processors else []

    @property
    def unread_tokens(self) -> int:
        """Of the prompt, but for its last token, with which decoding begins."""
        return len(self.request.checked.ids) - 1 - self.read_tokens

    def check(self) -> None:
        """Raises what was raised when the next token was sampled."""
        if self.error is not None and len(self.ids) - len(self.request.checked.ids) >= self.error_token:
            raise self.error

    def close(self) -> None:
        """Lets go of what it holds; its own steps end here, since MLX does not let them end in another thread."""
        self.cache, self.processors, self.sampler = [], [], None  # the functions hold this row: no cycle is to stay
        if self.steps is not None:
            with suppress(Exception):
                self.steps.close()

    def _process(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """All the row's processors in order, the logits as they were from the first failure on."""
        if self.error is not None:
            return logits
        has_own = bool(self.request.logits_processors)
        if has_own:
            mx.eval(tokens, logits)  # what fails here is not the caller's
        try:
            changed = logits[:]  # another object, as the tokens below: the caller may write into it before it fails
            for process in self.row.processors:
                changed = process(tokens[:], changed)
            changed = changed.astype(logits.dtype)  # another one would become that of the whole batch
            if has_own:
                # Some fail only when they are computed, which is to be here, not in the batch.
                _compute(changed)
            return changed
        except BaseException as error:  # SystemExit, too, is this request's alone
            self.error, self.error_token = _as_arcee_error(error), self._sampled
            return logits

    def _guard_sampler(self, sample: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        def call(logprobs: mx.array) -> mx.array:
            if self.error is None:
                try:
                    return sample(logprobs)
                except BaseException as error:
                    self.error, self.error_token = _as_arcee_error(error), self._sampled
                finally:
                    self._sampled += 1
            return mx.argmax(logprobs, axis=-1)

        return call


def _compute(array: mx.array) -> None:
    """Raises what fails in it, and in work begun beside it, which MLX would report to whoever computes next."""
    mx.eval(array)
    mx.synchronize(mx.default_stream(mx.cpu))  # where linear algebra and files are read, with a GPU, too
    mx.synchronize()


def _as_arcee_error(error: BaseException) -> BaseException:
    if isinstance(error, ArceeError):
        return error
    wrapped = CallbackError(f"sampling this request raised {type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
