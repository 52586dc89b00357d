"""Reading a prompt into a KV cache without asking what comes next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..model.decoder import ArceeForCausalLM

PromptProgress = Callable[[int, int], None]


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
