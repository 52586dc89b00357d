"""From logits to a token: bias, penalties, the caller's own functions, filters, and a draw with keys of our own.

No global random state is read or written.

The filters are transformers' (`generation/logits_process.py`), in its order, in float32; XTC is mlx-lm's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence

import mlx.core as mx

from ..errors import CallbackError
from .options import GenerateOptions

# (tokens so far, prompt and answer: (n,); logits: (1, V)) -> logits (1, V).
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]


def draw_seed() -> int:
    """A seed from the operating system's randomness, for a caller who named none."""
    return int.from_bytes(os.urandom(4), "little")


class Sampler:
    """Draws one token for each row; every step splits its own key off the request's seed."""

    def __init__(self, options: GenerateOptions, xtc_keeps: Collection[int] = ()) -> None:
        """Args:
        options: resolved (no None left but the seed).
        xtc_keeps: ids that XTC never leaves out.
        """
        assert options.temp is not None and options.top_k is not None
        assert options.top_p is not None and options.min_p is not None
        self._temp, self._top_k, self._top_p, self._min_p = options.temp, options.top_k, options.top_p, options.min_p
        self._xtc_probability, self._xtc_threshold = options.xtc_probability, options.xtc_threshold
        self._xtc_keeps = mx.array(sorted(xtc_keeps)) if xtc_keeps else None
        self._key = mx.random.key(draw_seed() if options.seed is None else options.seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Scores (B, V) -> token ids (B,)."""
        if self._temp == 0:
            return mx.argmax(logprobs, axis=-1)
        logprobs = logprobs.astype(mx.float32)
        # From the likeliest down, so that no temperature, however small, leaves float32's range upwards.
        tempered = (logprobs - mx.max(logprobs, axis=-1, keepdims=True)) / max(self._temp, 1e-30)
        scores = filter_scores(tempered, top_k=self._top_k, top_p=self._top_p, min_p=self._min_p)
        self._key, key = mx.random.split(self._key)
        if self._xtc_probability:
            coin, key = mx.random.split(key)
            excluded = exclude_top_choices(scores, logprobs, threshold=self._xtc_threshold, keep=self._xtc_keeps)
            scores = mx.where(mx.random.uniform(key=coin) < self._xtc_probability, excluded, scores)
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


def exclude_top_choices(scores: mx.array, logprobs: mx.array, *, threshold: float, keep: mx.array | None) -> mx.array:
    """XTC: of the tokens over the threshold only the least likely stays. Source: mlx-lm's `apply_xtc`.

    Args:
        scores: float32 (B, V), filtered.
        logprobs: float32 (B, V), before the temperature, whose probabilities among what the filters left are compared.
        threshold: a probability.
        keep: int (n,), ids that are never left out; or None.
    """
    probabilities = mx.softmax(mx.where(scores == -mx.inf, -mx.inf, logprobs), axis=-1)
    least = mx.min(mx.where(probabilities > threshold, probabilities, mx.inf), axis=-1, keepdims=True)
    top = probabilities > least
    if keep is not None:
        top[..., keep] = False
    return mx.where(top, -mx.inf, scores)


def make_logits_processors(
    options: GenerateOptions,
    *,
    vocab_size: int,
    model_vocab_size: int,
    prompt_tokens: int = 0,
    hidden_ids: Sequence[int] = (),
    own: Sequence[LogitsProcessor] = (),
    grammar: LogitsProcessor | None = None,
) -> list[LogitsProcessor]:
    """What changes the logits before sampling, in order.

    Args:
        options: resolved.
        vocab_size: ids the tokenizer knows; a padded embedding's further rows are never sampled.
        model_vocab_size: ids the model gives logits for.
        prompt_tokens: of the tokens a processor is called with, those that are not the answer's.
        hidden_ids: tokens before those, which a processor is not called with, being in the KV cache already.
        own: the caller's, after those.
        grammar: lets through what may come next, and so comes last.
    """
    processors: list[LogitsProcessor] = []
    if options.logit_bias:
        processors.append(_bias(options.logit_bias.keys(), options.logit_bias.values()))
    if options.repetition_penalty not in (None, 1):
        processors.append(_with_tokens_before(hidden_ids, _repetition_penalty(options.repetition_penalty)))
    if options.frequency_penalty or options.presence_penalty:
        processors.append(_answer_penalties(options.frequency_penalty, options.presence_penalty, prompt_tokens))
    processors += [_with_tokens_before(hidden_ids, _checked(process)) for process in own]
    if grammar is not None:
        processors.append(grammar)
    elif vocab_size < model_vocab_size:
        known = mx.arange(model_vocab_size) < vocab_size
        processors.append(lambda _tokens, logits: mx.where(known, logits, -mx.inf))
    return processors


def _bias(ids: Iterable[int], biases: Iterable[float]) -> LogitsProcessor:
    where, what = mx.array(list(ids)), mx.array(list(biases))
    return lambda _tokens, logits: logits.at[:, where].add(what)


def _repetition_penalty(penalty: float) -> LogitsProcessor:
    # Over prompt and answer, as transformers; mlx-lm's own looks back 20 tokens only.
    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        seen = logits[:, tokens]
        logits[:, tokens] = mx.where(seen < 0, seen * penalty, seen / penalty)
        return logits

    return penalize


def _answer_penalties(frequency: float, presence: float, prompt_tokens: int) -> LogitsProcessor:
    # Over the answer alone, as OpenAI; mlx-lm's count the prompt, too.
    def penalize(tokens: mx.array, logits: mx.array) -> mx.array:
        answer = tokens[prompt_tokens:]
        if answer.size == 0:
            return logits
        if presence:
            logits[:, answer] = logits[:, answer] - presence
        return logits.at[:, answer].subtract(frequency) if frequency else logits

    return penalize


def _with_tokens_before(ids: Sequence[int], process: LogitsProcessor) -> LogitsProcessor:
    if not ids:
        return process
    before = mx.array(list(ids))
    return lambda tokens, logits: process(mx.concatenate([before, tokens.astype(before.dtype)]), logits)


def _checked(process: LogitsProcessor) -> LogitsProcessor:
    """The caller's function, whose mistakes are reported as the caller's."""
    name = getattr(process, "__qualname__", type(process).__qualname__)

    def call(tokens: mx.array, logits: mx.array) -> mx.array:
        shape = logits.shape
        try:
            changed = process(tokens, logits)
        except Exception as error:
            raise CallbackError(f"logits processor {name} raised {type(error).__name__}: {error}") from error
        if not isinstance(changed, mx.array) or changed.shape != shape:
            got = f"shape {changed.shape}" if isinstance(changed, mx.array) else type(changed).__name__
            raise CallbackError(
                f"logits processor {name} returned {got}; expected logits of shape {shape}; return them"
            )
        return changed

    return call
