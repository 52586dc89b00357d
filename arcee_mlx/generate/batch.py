"""generate_batch and generate_answers: many answers at once, for scripts, over mlx-lm's continuous batching.

One decode step of a batch reads the weights once for all its rows, which is what a GPU's time goes into. On Linux's CPU
a fast BLAS gains most: preload OpenBLAS (see `arcee-mlx bench batch`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .. import upstream
from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.decoder import ArceeForCausalLM
from .answer import Answer, GenerationChunk, join_chunks
from .options import GenerateOptions
from .prefill import fill_cache
from .prompt_cache import PromptCache
from .request import Prompt, Request, read_request
from .row import Row
from .sampling import LogitsProcessor

_PREFILL_ROWS = 8


@dataclass(frozen=True)
class _Start:
    """A row, what is still to be computed of its prompt, and the cache that holds the rest."""

    row: Row
    ids: list[int]
    cache: list[Any]
    limit: int


def generate_batch(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    options: GenerateOptions | Sequence[GenerateOptions | None] | None = None,
    *,
    logits_processors: Sequence[LogitsProcessor] = (),
    max_batch_size: int = 32,
) -> list[Answer]:
    """Answers several prompts at once; an answer is that of `generate` alone, but for the order of float sums.

    Where the two likeliest tokens are closer than that noise, one may take the other's place and the answer goes on
    from it. Measured on a float32 model of the demo's shape: no noise at all with the BLAS of MLX's Linux wheel, 6e-6
    of the logits' standard deviation with OpenBLAS, and in both all answers the same. Not measured on Metal.

    Args:
        prompts: each as in `generate`.
        options: for all prompts, or one for each. Rows without a seed draw one each; a row's seed gives what it gives
            alone. A batch keeps all its tokens in float and drafts none: kv_bits, max_kv_size and num_draft_tokens are
            refused.
        logits_processors: called for every row, with that row's tokens.
        max_batch_size: rows decoded at once; further prompts start as earlier ones end.

    Returns:
        One answer a prompt, in their order.

    Raises:
        InputError, TokenizerError, CallbackError: as `generate`; an InputError names the prompt's place.
    """
    started_s = time.perf_counter()
    each = list(options) if isinstance(options, Sequence) else [options] * len(prompts)
    if len(each) != len(prompts):
        raise InputError(f"options has {len(each)} entries; expected one for all or {len(prompts)}, one a prompt")
    if isinstance(max_batch_size, bool) or not isinstance(max_batch_size, int) or max_batch_size < 1:
        raise InputError(f"max_batch_size is {max_batch_size!r}; expected an integer of at least 1")
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int | Mapping)):
        raise InputError("prompts is a single prompt; expected a list of prompts; put it into one")
    requests = [_read_row(model, tokenizer, i, *both) for i, both in enumerate(zip(prompts, each, strict=True))]
    starts = [
        _Start(
            Row(model, tokenizer, request, logits_processors, started_s), request.ids, model.make_cache(), request.limit
        )
        for request in requests
    ]
    step = min((request.options.prefill_step_size for request in requests), default=1)
    return _run(model, starts, max_batch_size, step)


def generate_answers(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    n: int,
    prompt_cache: PromptCache | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> list[Answer]:
    """Samples n answers to one prompt, which is read once.

    Every answer gets a copy of the prompt's keys and values: n times the memory that one takes, and about half as much
    again while they are copied (measured: 12.7 times at n=8). Answer i is the one that `generate` gives for the first
    answer's seed plus i. With `logprobs` they can be ranked: `max(answers, key=lambda a: sum(a.logprobs))`.

    Args:
        n: how many; with more than one a temperature is needed.
        prompt_cache: as in `generate`, kept in float and without max_kv_size.

    Raises: see `generate_batch`.
    """
    started_s = time.perf_counter()
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise InputError(f"n is {n!r}; expected an integer of at least 1")
    unseen = prompt_cache.unseen_tokens if prompt_cache else 0
    request = read_request(model.config, tokenizer, prompt, options, unseen_tokens=unseen)
    _refuse_for_one(request.options)
    if prompt_cache is not None:
        _refuse_for_one(prompt_cache)
    if n > 1 and request.options.temp == 0:
        raise InputError(f"n is {n} without a temperature: all answers would be the same; give temp over 0")
    seed = request.options.seed
    assert seed is not None
    cache, cached = prompt_cache.fork(request.ids) if prompt_cache else (model.make_cache(), 0)
    fill_cache(model, cache, request.ids[cached:-1], request.options.prefill_step_size)
    hidden = len(request.ids) - 1
    starts = []
    for i in range(n):
        own = replace(request, options=replace(request.options, seed=(seed + i) % 2**64))
        row = Row(model, tokenizer, own, logits_processors, started_s, hidden_tokens=hidden, cached_tokens=cached)
        starts.append(_Start(row, request.ids[-1:], cache, request.limit))
    return _run(model, starts, n, request.options.prefill_step_size)


def _read_row(
    model: ArceeForCausalLM, tokenizer: Tokenizer, place: int, prompt: Prompt, options: GenerateOptions | None
) -> Request:
    try:
        request = read_request(model.config, tokenizer, prompt, options)
        _refuse_for_one(request.options)
    except InputError as error:
        raise InputError(f"prompt {place}: {error}") from error
    return request


def _refuse_for_one(source: GenerateOptions | PromptCache) -> None:
    for name in ("kv_bits", "max_kv_size", "num_draft_tokens"):
        if value := getattr(source, name, None):
            raise InputError(f"{name} is {value} in a batch, which keeps all in float and drafts nothing; leave it out")


def _run(model: ArceeForCausalLM, starts: Sequence[_Start], max_batch_size: int, prefill_step: int) -> list[Answer]:
    batching = upstream.mlx_lm_module("generate").BatchGenerator
    # A batch's prompts are padded to one length, and a rope table that depends on the length would be the longest's.
    prefill_rows = 1 if model.model.rotary_emb.depends_on_length else min(_PREFILL_ROWS, max_batch_size)
    batch = batching(
        model,
        prefill_batch_size=prefill_rows,
        completion_batch_size=max_batch_size,
        prefill_step_size=prefill_step,
    )
    batch.close()  # puts back the process's wired limit, which the constructor raised; it does nothing else
    uids = batch.insert(
        [start.ids for start in starts],
        max_tokens=[start.limit for start in starts],
        caches=[start.cache for start in starts],
        samplers=[None if start.row.is_plain else start.row.sampler for start in starts],
        logits_processors=[start.row.processors for start in starts],
    )
    rows = {uid: start.row for uid, start in zip(uids, starts, strict=True)}
    chunks: dict[int, list[GenerationChunk]] = {uid: [] for uid in uids}
    ended: set[int] = set()
    while len(ended) < len(uids):
        for response in batch.next_generated():
            chunk = rows[response.uid].add(response.token)
            chunks[response.uid].append(chunk)
            if chunk.stop_reason is not None:
                ended.add(response.uid)
                if response.finish_reason is None:
                    batch.remove([response.uid])
    mx.synchronize(batch.stream)  # one step ran ahead of the last token read
    return [join_chunks(chunks[uid], request=rows[uid].request) for uid in uids]
