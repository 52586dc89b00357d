"""generate and stream_generate: a prompt in, text out, over mlx-lm's generation step and caches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .. import upstream
from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.decoder import ArceeForCausalLM
from .options import GenerateOptions, StopReason, context_tokens
from .sampling import Sampler, draw_seed, make_logits_processors
from .stop import StopMatcher

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
PromptProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took so far.

    Attributes:
        prompt_tokens: tokens of the prompt.
        prompt_tokens_per_s: of them, per second until the first new token was there.
        generation_tokens: new tokens, the end-of-text token included.
        generation_tokens_per_s: of those after the first; 0 for fewer than two.
        time_to_first_token_s: from the call to the first new token.
        peak_memory_bytes: most memory MLX held in this process.
        seed: of the sampling; the same seed, prompt and options give the same text.
    """

    prompt_tokens: int
    prompt_tokens_per_s: float
    generation_tokens: int
    generation_tokens_per_s: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    seed: int


@dataclass(frozen=True)
class GenerationChunk:
    """One token's worth of an answer.

    Attributes:
        text: text that has become certain; may be empty, and may reach further back than the token.
        token: id of the new token.
        stop_reason: why the answer ended, on the last chunk; None before.
        stats: so far.
    """

    text: str
    token: int
    stop_reason: StopReason | None
    stats: GenerationStats


def generate(
    model: ArceeForCausalLM, tokenizer: Tokenizer, prompt: Prompt, options: GenerateOptions | None = None
) -> str:
    """Makes an answer and returns its text.

    Args:
        model: from `load`.
        tokenizer: from `load`.
        prompt: text, taken as it is; or messages ({"role": ..., "content": ...}), rendered by the checkpoint's chat
            template; or token ids.
        options: None takes the checkpoint's generation_config.json throughout.

    Raises:
        InputError: the prompt is empty, too long, or holds an id the model does not have; an option does not fit.
        TokenizerError: messages for a checkpoint without a chat template, or a template that fails.
    """
    return "".join(chunk.text for chunk in stream_generate(model, tokenizer, prompt, options))


def stream_generate(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    prompt_progress: PromptProgress | None = None,
) -> Iterator[GenerationChunk]:
    """Makes an answer piece by piece; the texts joined are what `generate` returns.

    Arguments are checked in this call; computing begins with the first `next`. Closing the iterator ends it.

    Args:
        prompt_progress: called with (tokens computed, tokens in all) as a long prompt is read.

    See `generate` for the rest.
    """
    started_s = time.perf_counter()
    options = (options or GenerateOptions()).resolve(tokenizer.generation_config, model.config)
    options = replace(options, seed=draw_seed() if options.seed is None else options.seed)
    ids = encode_prompt(tokenizer, prompt)
    room = _check_prompt(ids, model)
    asked = options.max_tokens
    limit = room if asked in (None, -1) else min(asked, room)
    eos = tokenizer.eos_token_ids | _extra_eos(tokenizer, options)
    return _stream(
        model, tokenizer, ids, options, eos, limit, limit == asked, started_s, prompt_progress or (lambda *_: None)
    )


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of a prompt in any of its three forms.

    Raises:
        InputError: it is none of the three.
        TokenizerError: messages cannot be rendered.
    """
    if isinstance(prompt, str):
        # A rendered template already begins with the token the tokenizer would put there.
        whole = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return tokenizer.encode(prompt, add_special_tokens=not whole) if prompt else []
    items: list[Any] = prompt.tolist() if isinstance(prompt, mx.array | np.ndarray) else list(prompt)
    if items and all(isinstance(item, Mapping) for item in items):
        return tokenizer.encode_chat(items, add_generation_prompt=True)
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise InputError("prompt holds neither text, nor messages, nor token ids only; expected one of the three")
    return items


def make_prompt_cache(model: ArceeForCausalLM, options: GenerateOptions) -> list[Any]:
    """The KV cache the options ask for, one entry a layer."""
    if options.kv_bits is None:
        return model.make_cache(options.max_kv_size)
    quantized = upstream.mlx_lm_module("models.cache").QuantizedKVCache
    return [quantized(group_size=options.kv_group_size, bits=options.kv_bits) for _ in model.layers]


def _stream(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    ids: list[int],
    options: GenerateOptions,
    eos: frozenset[int],
    limit: int,
    asked_for: bool,
    started_s: float,
    prompt_progress: PromptProgress,
) -> Iterator[GenerationChunk]:
    assert options.seed is not None
    generate_step = upstream.mlx_lm_module("generate").generate_step
    steps = generate_step(
        mx.array(ids),
        model,
        max_tokens=limit,
        sampler=Sampler(options),
        logits_processors=make_logits_processors(
            options, vocab_size=tokenizer.vocab_size, model_vocab_size=model.config.vocab_size
        ),
        prompt_cache=make_prompt_cache(model, options),
        prefill_step_size=options.prefill_step_size,
        prompt_progress_callback=prompt_progress,
    )
    detokenizer, matcher = tokenizer.detokenizer(), StopMatcher(options.stop)
    prefill_s = time.perf_counter()
    first_s = prefill_s
    with contextlib.closing(steps):
        for count, (token, _) in enumerate(steps, start=1):
            now_s = time.perf_counter()
            first_s = now_s if count == 1 else first_s
            reason: StopReason | None = None
            text = ""
            if token in eos:
                reason = "eos"
            else:
                text = matcher.add(detokenizer.add(token))
                if not matcher.stopped and count == limit:
                    reason = "max_tokens" if asked_for else "context_full"
            if reason is not None:
                text += matcher.add(detokenizer.finish()) + matcher.finish()
            if matcher.stopped:
                reason = "stop_string"
            stats = GenerationStats(
                prompt_tokens=len(ids),
                prompt_tokens_per_s=len(ids) / (first_s - prefill_s),
                generation_tokens=count,
                generation_tokens_per_s=(count - 1) / (now_s - first_s) if count > 1 else 0.0,
                time_to_first_token_s=first_s - started_s,
                peak_memory_bytes=mx.get_peak_memory(),
                seed=options.seed,
            )
            yield GenerationChunk(text, token, reason, stats)
            if reason is not None:
                return


def _check_prompt(ids: Sequence[int], model: ArceeForCausalLM) -> int:
    """Raises InputError unless the model can take the prompt; returns how many tokens may follow it."""
    if not ids:
        raise InputError("the prompt is empty; expected at least one token; give some text")
    for place, token in enumerate(ids):
        if not 0 <= token < model.config.vocab_size:
            raise InputError(
                f"prompt holds the id {token} at place {place}; expected 0 to {model.config.vocab_size - 1}; "
                f"check that tokenizer and model belong together"
            )
    room = context_tokens(model.config) - len(ids)
    if room < 1:
        raise InputError(
            f"the prompt has {len(ids)} tokens; expected fewer than the {context_tokens(model.config)} positions of the "
            f"model; shorten it"
        )
    return room


def _extra_eos(tokenizer: Tokenizer, options: GenerateOptions) -> frozenset[int]:
    found = {text: tokenizer.token_id(text) for text in options.extra_eos_tokens}
    for text, token in found.items():
        if token is None:
            raise InputError(f"extra_eos_tokens names {text!r}; expected a token of this tokenizer's vocabulary")
    return frozenset(token for token in found.values() if token is not None)
