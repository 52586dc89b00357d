"""From logits to a token, with keys of our own: no global random state is read or written.

The filters are transformers' (`generation/logits_process.py`), in its order, in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import mlx.core as mx

from .options import GenerateOptions

LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def draw_seed() -> int:
    """A seed from the operating system's randomness, for a caller who named none."""
    return int.from_bytes(os.urandom(4), "little")


class Sampler:
    """Draws one token for each row; every step splits its own key off the request's seed."""

    def __init__(self, options: GenerateOptions) -> None:
        """Args: options: resolved (no None left but the seed)."""
        assert options.temp is not None and options.top_k is not None
        assert options.top_p is not None and options.min_p is not None
        self._temp, self._top_k, self._top_p, self._min_p = options.temp, options.top_k, options.top_p, options.min_p
        self._key = mx.random.key(draw_seed() if options.seed is None else options.seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Scores (B, V) -> token ids (B,)."""
        if self._temp == 0:
            return mx.argmax(logprobs, axis=-1)
        scores = filter_scores(
            logprobs.astype(mx.float32) / self._temp, top_k=self._top_k, top_p=self._top_p, min_p=self._min_p
        )
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(scores, key=key)


def filter_scores(scores: mx.array, *, top_k: int, top_p: float, min_p: float) -> mx.array:
    """Sets what may not be drawn to -inf: transformers' top-k, then top-p, then min-p.

    Args:
        scores: float32 (B, V), already divided by the temperature.
    """
    if 0 < top_k < scores.shape[-1]:
        least = mx.min(mx.topk(scores, top_k, axis=-1), axis=-1, keepdims=True)
        scores = mx.where(scores < least, -mx.inf, scores)
    if top_p < 1:
        ascending = mx.argsort(scores, axis=-1)
        sums = mx.cumsum(mx.softmax(mx.take_along_axis(scores, ascending, axis=-1), axis=-1), axis=-1)
        dropped = sums <= 1 - top_p
        dropped[..., -1] = False  # the likeliest always stays
        scores = mx.where(mx.put_along_axis(mx.zeros_like(dropped), ascending, dropped, axis=-1), -mx.inf, scores)
    if min_p > 0:
        probabilities = mx.softmax(scores, axis=-1)
        least = min_p * mx.max(probabilities, axis=-1, keepdims=True)
        scores = mx.where(probabilities < least, -mx.inf, scores)
    return scores


def make_logits_processors(
    options: GenerateOptions, *, vocab_size: int, model_vocab_size: int
) -> list[LogitsProcessor]:
    """What changes the logits before sampling.

    Args:
        options: resolved.
        vocab_size: ids the tokenizer knows; a padded embedding's further rows are never sampled.
        model_vocab_size: ids the model gives logits for.
    """
    processors: list[LogitsProcessor] = []
    if vocab_size < model_vocab_size:
        known = mx.arange(model_vocab_size) < vocab_size
        processors.append(lambda _tokens, logits: mx.where(known, logits, -mx.inf))
    if options.repetition_penalty not in (None, 1):
        processors.append(_repetition_penalty(options.repetition_penalty))
    return processors


def _repetition_penalty(penalty: float) -> LogitsProcessor:
    # Over prompt and answer, as transformers; mlx-lm's own looks back 20 tokens only.
    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        seen = logits[:, tokens]
        logits[:, tokens] = mx.where(seen < 0, seen * penalty, seen / penalty)
        return logits

    return penalize
