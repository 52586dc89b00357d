"""KV caches: making the one that is asked for, and reading tokens into it without asking what comes next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .. import upstream
from ..model.decoder import ArceeForCausalLM
from .options import GenerateOptions

PromptProgress = Callable[[int, int], None]


def make_prompt_cache(model: ArceeForCausalLM, options: GenerateOptions) -> list[Any]:
    """The KV cache the options ask for, one entry a layer."""
    if options.kv_bits is None:
        return model.make_cache(options.max_kv_size)
    quantized = upstream.mlx_lm_module("models.cache").QuantizedKVCache
    return [quantized(group_size=options.kv_group_size, bits=options.kv_bits) for _ in model.layers]


def fill_cache(
    model: ArceeForCausalLM,
    cache: list[Any],
    ids: Sequence[int],
    step_tokens: int,
    progress: PromptProgress = lambda *_: None,
) -> None:
    """Computes the keys and values of further tokens into a cache, so many at a time, the head left out.

    Args:
        progress: called with (tokens computed, tokens in all).
    """
    for start in range(0, len(ids), step_tokens):
        progress(start, len(ids))
        model.model(mx.array([list(ids[start : start + step_tokens])]), cache)
        mx.eval([layer.state for layer in cache])
        mx.clear_cache()
    progress(len(ids), len(ids))
