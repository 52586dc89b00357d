"""generate and stream_generate: a prompt in, text out, over mlx-lm's generation step and caches."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Iterator, Sequence

import mlx.core as mx

from .. import upstream
from ..checkpoint.tokenizer import Tokenizer
from ..errors import ArceeError
from ..model.decoder import ArceeForCausalLM
from ..thread_end import wait_for_this_thread_at_exit
from .answer import GenerationChunk, check_complete
from .options import GenerateOptions
from .prefill import PromptProgress, make_prompt_cache
from .prompt_cache import PromptCache
from .request import Prompt, Request, read_request
from .row import Row
from .sampling import LogitsProcessor
from .speculative import Speculator, check_drafts, make_drafter


def generate(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    draft_model: ArceeForCausalLM | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
) -> str:
    """Makes an answer and returns its text.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt: text, taken as it is; or messages ({"role": ..., "content": ...}), rendered by the checkpoint's chat
            template; or token ids.
        options: None takes the checkpoint's generation_config.json throughout.
        prompt_cache: from `cache_prompt` or `load_prompt_cache`; what it has of the prompt is not computed again. One
            from a file of mlx_lm's stands before the prompt instead; then penalties see the prompt's tokens only.
        draft_model: a smaller model with the same tokenizer, to draft `options.num_draft_tokens` tokens at a time.
        logits_processors: functions (tokens so far (n,), logits (1, V)) -> logits (1, V), called in order for every
            new token, after the penalties and before the temperature. Steps run ahead, so they may be called for one
            token more than there is.

    Raises:
        InputError: the prompt is empty, too long, or holds an id the model does not have; an option does not fit.
        TokenizerError: messages for a checkpoint without a chat template, or a template that fails or leaves tools out.
        GrammarError: a schema, regex, grammar, choices, or parameters of a tool that cannot be enforced.
        IncompleteAnswerError: the answer was cut off before it was what they ask for; `text` is what was made.
        CallbackError: one of logits_processors raised, or did not return logits; the message names it.
    """
    chunks = stream_generate(
        model,
        tokenizer,
        prompt,
        options,
        prompt_cache=prompt_cache,
        draft_model=draft_model,
        logits_processors=logits_processors,
    )
    text, last = "", None
    for last in chunks:
        text += last.text
    if last is not None:
        check_complete(last.is_complete, text, last.stop_reason)
    return text


def stream_generate(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    draft_model: ArceeForCausalLM | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_progress: PromptProgress | None = None,
) -> Iterator[GenerationChunk]:
    """Makes an answer piece by piece; the texts joined are what `generate` returns.

    Arguments are checked in this call; computing begins with the first `next`. Closing the iterator ends it.

    Args:
        prompt_progress: called with (tokens computed, tokens in all) as a long prompt is read.

    See `generate` for the rest.
    """
    started_s = time.perf_counter()
    unseen = prompt_cache.unseen_tokens if prompt_cache else 0
    request = read_request(model.config, tokenizer, prompt, options, unseen_tokens=unseen)
    if prompt_cache is not None:
        prompt_cache.check_fits(request.options, model)
    check_drafts(model, request.options, draft_model, prompt_cache)
    return _stream(
        model,
        tokenizer,
        request,
        prompt_cache,
        draft_model,
        logits_processors,
        started_s,
        prompt_progress or (lambda *_: None),
    )


def _stream(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    request: Request,
    prompt_cache: PromptCache | None,
    draft_model: ArceeForCausalLM | None,
    own_processors: Sequence[LogitsProcessor],
    started_s: float,
    prompt_progress: PromptProgress,
) -> Iterator[GenerationChunk]:
    wait_for_this_thread_at_exit()
    generate_step = upstream.mlx_lm_module("generate").generate_step
    options = request.options
    cache, cached = prompt_cache.fork(request.ids) if prompt_cache else (make_prompt_cache(model, options), 0)
    row = Row(model, tokenizer, request, own_processors, started_s, hidden_tokens=cached, cached_tokens=cached)
    keeps_all_tokens = options.max_kv_size is None and (prompt_cache is None or prompt_cache.max_kv_size is None)
    drafter = make_drafter(tokenizer, request, row, draft_model, keeps_all_tokens=keeps_all_tokens)
    speculator = Speculator(model, drafter, request, unread=len(request.ids) - cached) if drafter else None
    steps = generate_step(
        mx.array(request.ids[cached:]),
        speculator or model,
        max_tokens=request.limit,
        sampler=row.sampler,
        logits_processors=row.processors,
        prompt_cache=cache,
        prefill_step_size=options.prefill_step_size,
        prompt_progress_callback=prompt_progress,
    )
    thread, first = threading.get_ident(), True
    try:
        while True:
            with own_default_stream():
                step = next(steps, None)
            if step is None:
                return
            token, logprobs = step
            if first and math.isnan(logprobs[token].item()):
                raise ArceeError("the model computes NaN; expected finite numbers; check its weights and processors")
            first = False
            drafted, accepted = speculator.read_counts() if speculator else (0, 0)
            chunk = row.add(token, drafted=drafted, accepted=accepted)
            yield chunk
            if chunk.stop_reason is not None:
                return
    finally:
        try:
            with own_default_stream():
                steps.close()
        except RuntimeError:  # MLX does not leave mlx-lm's stream in another thread; there is nothing else to close
            if threading.get_ident() == thread:
                raise


@contextlib.contextmanager
def own_default_stream() -> Iterator[None]:
    """mlx-lm's step yields inside its own stream; the caller's code between two tokens is to run on the caller's."""
    before = mx.default_stream(mx.default_device())
    try:
        yield
    finally:
        mx.set_default_stream(before)
