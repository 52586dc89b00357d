"""beam_search: the likeliest answers that a search over several beginnings at once finds, as transformers finds them.

Source: transformers 5.23 `generation/utils.py`, `_beam_search` (behaviour, not code), for one prompt without sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from ..checkpoint.tokenizer import Tokenizer
from ..errors import ArceeError, InputError
from ..model.decoder import ArceeForCausalLM
from .options import GenerateOptions, StopReason
from .prefill import fill_cache, make_prompt_cache
from .request import Prompt, Request, read_request
from .sampling import LogitsProcessor, make_logits_processors

EarlyStopping = bool | Literal["never"]
_NOT_FOR_BEAMS = ("temp", "top_k", "top_p", "min_p", "xtc_probability", "seed", "stop", "logprobs", "num_draft_tokens")


@dataclass(frozen=True)
class Beam:
    """An answer that was found.

    Attributes:
        text: of it.
        tokens: the end-of-text token included.
        score: sum of its tokens' log-probabilities over its length ** length_penalty; transformers' sequences_scores.
        stop_reason: why it ended.
    """

    text: str
    tokens: tuple[int, ...]
    score: float
    stop_reason: StopReason


@dataclass(frozen=True)
class _Running:
    """A beginning that may go on: its tokens, and the sum of their log-probabilities."""

    tokens: tuple[int, ...]
    sum: float


def beam_search(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    num_return_sequences: int = 1,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> list[Beam]:
    """Searches for the likeliest answers: what transformers' generate finds with num_beams and do_sample=False.

    Args:
        options: their sampling half does not apply and is refused (generation_config.json's is passed over).
        num_beams: beginnings followed at once; the KV cache has as many rows.
        length_penalty: exponent of the length that a finished answer's sum is divided by: over 0 favours long ones.
        early_stopping: True ends when num_beams answers are finished; False when a better one is unlikely; "never"
            when none can be better.
        num_return_sequences: answers to give, at most num_beams.
        logits_processors: as in `generate`, but called with log-probabilities, as transformers' are.

    Returns:
        The best first.

    Raises:
        InputError, TokenizerError, CallbackError: as `generate`.
    """
    _check_arguments(num_beams, length_penalty, early_stopping, num_return_sequences)
    options = options or GenerateOptions()
    for name in _NOT_FOR_BEAMS:
        if getattr(options, name) not in (None, 0, (), False) or (name == "seed" and options.seed is not None):
            raise InputError(
                f"{name} is {getattr(options, name)!r} in a beam search, which neither samples nor drafts; leave it out"
            )
    if options.has_grammar or options.tools:
        raise InputError(
            "a beam search follows no schema, regex, grammar or choices, and calls no tools; leave them out, or sample "
            "instead"
        )
    request = read_request(model.config, tokenizer, prompt, replace(options, temp=0.0, top_k=0, top_p=1.0, min_p=0.0))
    processors = make_logits_processors(
        request.options,
        vocab_size=tokenizer.vocab_size,
        model_vocab_size=model.config.vocab_size,
        prompt_tokens=len(request.ids),
        own=logits_processors,
    )
    found = _search(model, request, processors, num_beams, length_penalty, early_stopping)
    if not found:
        raise ArceeError("the model computes NaN; expected finite numbers; check its weights and processors")
    return [_as_beam(tokenizer, request, *best) for best in found[:num_return_sequences]]


def _search(
    model: ArceeForCausalLM,
    request: Request,
    processors: Sequence[LogitsProcessor],
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
) -> list[tuple[float, tuple[int, ...]]]:
    """Finished answers as (score, tokens), the best first, at most num_beams."""
    cache = make_prompt_cache(model, request.options)
    fill_cache(model, cache, request.ids[:-1], request.options.prefill_step_size)
    kept = max(2, 1 + len(request.eos)) * num_beams  # so many that num_beams of them go on, whichever tokens end
    running = [_Running((), 0.0)]
    last = request.ids[-1:]
    finished: list[tuple[float, tuple[int, ...]]] = []
    for length in range(1, request.limit + 1):
        logprobs = _next_logprobs(model, cache, request.ids, running, last, processors)
        going_on: list[tuple[int, _Running]] = []
        for rank, (parent, token, total) in enumerate(_best(logprobs, running, kept)):
            tokens = (*running[parent].tokens, token)
            if token not in request.eos and length < request.limit:
                going_on.append((parent, _Running(tokens, total)))
            elif rank < num_beams:
                finished.append((total / length**length_penalty, tokens))
        finished = sorted(finished, key=lambda answer: -answer[0])[:num_beams]
        going_on = going_on[:num_beams]
        if not going_on or _is_over(
            finished, going_on[0][1], length, request, num_beams, length_penalty, early_stopping
        ):
            break
        parents = [parent for parent, _ in going_on]
        if parents != list(range(len(running))):
            _take_rows(cache, mx.array(parents))
        running = [beam for _, beam in going_on]
        last = [beam.tokens[-1] for beam in running]
    return finished


def _take_rows(cache: list[Any], rows: mx.array) -> None:
    for layer in cache:
        layer.keys, layer.values = tree_map(lambda array: array[rows], (layer.keys, layer.values))


def _next_logprobs(
    model: ArceeForCausalLM,
    cache: list[Any],
    prompt: list[int],
    running: Sequence[_Running],
    last: list[int],
    processors: Sequence[LogitsProcessor],
) -> mx.array:
    """Processed log-probabilities of the next token, float32 (beams, V)."""
    logits = model(mx.array(last)[:, None], cache=cache)[:, -1].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if not processors:
        return logprobs
    rows = []
    for i, beam in enumerate(running):
        row, tokens = logprobs[i : i + 1], mx.array([*prompt, *beam.tokens])
        for process in processors:
            row = process(tokens, row)
        rows.append(row)
    return mx.concatenate(rows)


def _best(logprobs: mx.array, running: Sequence[_Running], count: int) -> list[tuple[int, int, float]]:
    """The continuations with the largest sums, as (beam, token, sum), the largest first."""
    sums = (logprobs + mx.array([beam.sum for beam in running])[:, None]).flatten()
    count = min(count, sums.size)
    top = mx.argpartition(-sums, kth=count - 1)[:count]
    ids, totals = np.array(top), np.array(sums[top])
    order = np.argsort(-totals, kind="stable")
    width = logprobs.shape[-1]
    return [(int(ids[i]) // width, int(ids[i]) % width, float(totals[i])) for i in order if np.isfinite(totals[i])]


def _is_over(
    finished: Sequence[tuple[float, tuple[int, ...]]],
    best_running: _Running,
    length: int,
    request: Request,
    num_beams: int,
    length_penalty: float,
    early_stopping: EarlyStopping,
) -> bool:
    if len(finished) < num_beams:
        return False
    if early_stopping is True:
        return True
    # The length at which a running answer could score best; False guesses it is the present one.
    longest = request.limit if early_stopping == "never" and length_penalty > 0 else length
    return best_running.sum / longest**length_penalty <= finished[-1][0]


def _as_beam(tokenizer: Tokenizer, request: Request, score: float, tokens: tuple[int, ...]) -> Beam:
    ended = tokens[-1] in request.eos
    text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
    return Beam(text, tokens, score, "eos" if ended else request.limit_reason)


def _check_arguments(
    num_beams: int, length_penalty: float, early_stopping: EarlyStopping, num_return_sequences: int
) -> None:
    for name, value in (("num_beams", num_beams), ("num_return_sequences", num_return_sequences)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; expected an integer of at least 1")
    if num_return_sequences > num_beams:
        raise InputError(f"num_return_sequences is {num_return_sequences}; expected at most num_beams, {num_beams}")
    if isinstance(length_penalty, bool) or not isinstance(length_penalty, int | float) or not abs(length_penalty) <= 50:
        raise InputError(f"length_penalty is {length_penalty!r}; expected a number from -50 to 50")
    if not isinstance(early_stopping, bool) and early_stopping != "never":
        raise InputError(f"early_stopping is {early_stopping!r}; expected True, False or 'never'")
