"""Batch: rows that decode together, over mlx-lm's GenerationBatch; and LoneRows, whose caches cannot be put together.

A row joins with its prompt read but for the last token, and may leave with its cache and join again: the tokens are
those of a row that stayed. mlx-lm computes one step ahead of the tokens it gives.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import mlx.core as mx

from .. import upstream
from ..generate.stream import own_default_stream
from ..model.decoder import ArceeForCausalLM
from .rows import ActiveRow

_NO_LIMIT = 2**62  # the rows say when they end


class Batch:
    """Rows with growing float caches: one pass over the weights makes a token of each."""

    def __init__(self, model: ArceeForCausalLM) -> None:
        self._model = model
        self._generate = upstream.mlx_lm_module("generate")
        self._batch = self._generate.GenerationBatch.empty(model, self._generate.greedy_sampler)
        self._rows: dict[int, ActiveRow] = {}
        self._next_uid = 0

    def __len__(self) -> int:
        return len(self._rows)

    def begin(self, row: ActiveRow) -> Any:
        """Samples the first token of a row whose cache holds all its ids but the last; `join` takes what it gives."""
        uid, self._next_uid = self._next_uid, self._next_uid + 1
        return self._generate.GenerationBatch(
            self._model,
            [uid],
            mx.array(row.ids[-1:]),
            [layer.merge([layer]) for layer in row.cache],
            [row.ids[:-1]],
            [row.sampler or self._generate.greedy_sampler],
            self._generate.greedy_sampler,
            [row.processors],
            [self._generate.StopSequences()],
            [_NO_LIMIT],
        )

    def join(self, row: ActiveRow, begun: Any) -> None:
        """Takes a row in; its cache was copied."""
        self._rows[begun.uids[0]] = row
        row.cache = []
        self._batch.extend(begun)
        self._copy_by_layer()

    def step(self) -> list[tuple[ActiveRow, int, mx.array]]:
        """One token of each row, with the scores (V,) it was drawn from; its keys and values are in the cache by then."""
        return [(self._rows[r.uid], r.token, r.logprobs) for r in self._batch.next()]

    def extract(self, row: ActiveRow) -> list[Any]:
        """A copy of a row's cache, which holds all tokens that were given out."""
        cache = self._batch.extract_cache(self._place(row))
        mx.eval([layer.state for layer in cache])
        return cache

    def leave(self, row: ActiveRow) -> tuple[int, mx.array]:
        """Takes a row out.

        Returns:
            the token that was drawn one step ahead, and its scores (V,). With it as its last id the row may begin again.
        """
        place = self._place(row)
        drawn = self._batch._next_tokens[place].item(), self._batch._next_logprobs[place]
        del self._rows[self._batch.uids[place]]
        self._batch.filter([i for i in range(len(self._batch)) if i != place])
        self._copy_by_layer()
        return drawn

    def _copy_by_layer(self) -> None:
        """So that no more than one layer is in memory twice, and what is not needed any more is gone at once."""
        for layer in self._batch.prompt_cache:  # what was cut off would stay with a mere view of the rest
            layer.keys, layer.values = mx.contiguous(layer.keys), mx.contiguous(layer.values)
            mx.eval(layer.keys, layer.values)

    def _place(self, row: ActiveRow) -> int:
        return next(i for i, uid in enumerate(self._batch.uids) if self._rows[uid] is row)


def step_alone(model: ArceeForCausalLM, row: ActiveRow) -> Generator[tuple[int, mx.array]]:
    """The tokens of a row whose cache, rotating or quantized, is in no batch; each with its scores (V,)."""
    steps = upstream.mlx_lm_module("generate").generate_step(
        mx.array(row.ids[-1:]),
        model,
        max_tokens=_NO_LIMIT,
        sampler=row.sampler,
        logits_processors=row.processors,
        prompt_cache=row.cache,
    )
    try:
        while True:
            with own_default_stream():
                step = next(steps)
            yield step
    finally:
        with own_default_stream():
            steps.close()  # here: MLX does not leave a stream in another thread
