"""Log-probabilities under the model itself, recorded beside the sampling; nothing is computed when not asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .answer import TokenLogprob


class LogprobRecorder:
    """Sees the logits before every other processor and the token after the sampler, once a step.

    Steps run ahead of what is read, so records wait in line until `read`.
    """

    def __init__(self, top: int) -> None:
        """Args: top: how many of the likeliest tokens to record, too."""
        self._top = top
        self._logprobs = mx.array(0)
        self._records: deque[tuple[mx.array, mx.array, mx.array]] = deque()

    def observe(self, _tokens: mx.array, logits: mx.array) -> mx.array:
        """A logits processor that changes nothing; the first of all."""
        logits32 = logits.astype(mx.float32)
        self._logprobs = logits32 - mx.logsumexp(logits32, axis=-1, keepdims=True)
        return logits

    def wrap(self, sample: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        """A sampler that draws as `sample` does and records."""

        def sample_and_record(scores: mx.array) -> mx.array:
            token = sample(scores)
            row = self._logprobs[0]
            ids = mx.zeros(0, mx.uint32)
            if self._top:
                ids = mx.argpartition(-row, kth=self._top - 1)[: self._top]
                ids = ids[mx.argsort(-row[ids])]
            record = (row[token[0]], ids, row[ids])
            mx.async_eval(record)
            self._records.append(record)
            return token

        return sample_and_record

    def read(self) -> tuple[float, tuple[TokenLogprob, ...]]:
        """The record of the oldest step not yet read: of its token, and of the likeliest, the likeliest first."""
        own, ids, logprobs = (np.array(array) for array in self._records.popleft())
        top = zip(ids.tolist(), logprobs.tolist(), strict=True)
        return float(own), tuple(TokenLogprob(token, logprob) for token, logprob in top)
