"""What requests will take at their full length, and whether that fits the budget. Predicted, so that nothing is tried."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from ..errors import InputError, MemoryBudgetError
from ..generate.request import Request as CheckedRequest
from ..model.config import ArceeConfig

STEP_TOKENS = 256  # mlx-lm's caches grow by so many
SYSTEM_SHARE = 0.75  # of the system's memory, where MLX names no working set
ACTIVATIONS = 4  # arrays of (tokens, intermediate_size) at once while a prompt is read: up, its square, down's input


@dataclass(frozen=True)
class RequestSize:
    """What a request needs of memory.

    Attributes:
        tokens: prompt and answer at full length, or max_kv_size if that is less.
        bytes_per_token: of keys and values in all layers.
        is_alone: whether it has its own cache to the end; others share one, padded to the longest of them.
    """

    tokens: int
    bytes_per_token: int
    is_alone: bool

    @property
    def kv_bytes(self) -> int:
        """Keys and values at full length."""
        return _round_up(self.tokens) * self.bytes_per_token


@dataclass(frozen=True)
class MemoryBudget:
    """The limit, and what predictions start from.

    Attributes:
        limit_bytes: of all that MLX may hold for the engine.
        weights_bytes: of the model.
        prefill_bytes: activations while one chunk of a prompt is read.
        step_bytes: logits and activations of one token of one row.
        kv_token_bytes: keys and values of a token in all layers, in the model's dtype.
    """

    limit_bytes: int
    weights_bytes: int
    prefill_bytes: int
    step_bytes: int
    kv_token_bytes: int

    def measure(self, config: ArceeConfig, checked: CheckedRequest) -> RequestSize:
        """What a request needs at full length."""
        options, tokens = checked.options, len(checked.ids) + checked.limit
        if options.max_kv_size is not None:
            # A rotating cache holds a chunk of the prompt beside what it keeps.
            tokens = min(tokens, options.max_kv_size + STEP_TOKENS)
        per_token = self.kv_token_bytes
        if options.kv_bits is not None:
            values = 2 * config.num_hidden_layers * config.kv_heads * config.head_size
            scales = 2 * (self.kv_token_bytes // values)  # a scale and a bias a group, in the model's dtype
            per_token = values * options.kv_bits // 8 + values // options.kv_group_size * scales
        return RequestSize(tokens, per_token, options.kv_bits is not None or options.max_kv_size is not None)

    def predict(self, sizes: Sequence[RequestSize], cached_bytes: int = 0) -> int:
        """The peak with these requests at full length: weights, cache of prefixes, keys and values, transient copies."""
        together = [size for size in sizes if not size.is_alone]
        alone = [size for size in sizes if size.is_alone]
        shared = len(together) * max((size.kv_bytes for size in together), default=0)
        # A row that joins or leaves makes MLX copy the shared cache; one alone is copied as it grows.
        copies = max([shared, *(size.kv_bytes for size in alone)])
        kv = shared + sum(size.kv_bytes for size in alone) + copies
        return self.weights_bytes + cached_bytes + kv + self.prefill_bytes + len(sizes) * self.step_bytes

    def check_alone(self, size: RequestSize, prompt_tokens: int) -> None:
        """Raises MemoryBudgetError where a request cannot fit even with nothing beside it."""
        needed = self.predict([size])
        if needed <= self.limit_bytes:
            return
        room = self.limit_bytes - self.predict([]) - self.step_bytes
        fits = max(0, room // (2 * size.bytes_per_token) // STEP_TOKENS * STEP_TOKENS)  # its cache, and a copy of it
        advice = (
            f"{fits} tokens of prompt and answer would fit: lower max_tokens to {fits - prompt_tokens}"
            if fits > prompt_tokens
            else f"{fits} tokens would fit, the prompt alone has {prompt_tokens}: shorten it"
        )
        raise MemoryBudgetError(
            f"the request needs {_gb(needed)} at its full length of {size.tokens} tokens (weights "
            f"{_gb(self.weights_bytes)}, keys and values {_gb(size.kv_bytes)}, and as much while they are copied); expected at "
            f"most the budget of {_gb(self.limit_bytes)}; {advice}, set kv_bits or max_kv_size, or raise memory_budget_bytes"
        )

    def check_beside(self, size: RequestSize, others: Sequence[RequestSize]) -> None:
        """Raises MemoryBudgetError where a request cannot begin before others have ended."""
        needed = self.predict([*others, size])
        if needed > self.limit_bytes:
            raise MemoryBudgetError(
                f"the request and the {len(others)} before it need {_gb(needed)} at full length, {_gb(self.predict(others))} "
                f"without it; expected at most the budget of {_gb(self.limit_bytes)}; let it wait, lower max_tokens, or raise "
                f"memory_budget_bytes"
            )


def make_budget(
    config: ArceeConfig, *, weights_bytes: int, itemsize: int, prefill_step_size: int, limit_bytes: int | None
) -> MemoryBudget:
    """The budget for a loaded model.

    Args:
        itemsize: bytes of one key or value in the model's dtype.
        limit_bytes: None takes what MLX recommends for the device, or three quarters of the system's memory.

    Raises:
        InputError: limit_bytes is no number of bytes. MemoryBudgetError: the weights do not fit it.
    """
    if limit_bytes is not None and (type(limit_bytes) is not int or limit_bytes < 1):
        raise InputError(f"memory_budget_bytes is {limit_bytes!r}; expected a number of bytes, or None")
    limit = default_limit_bytes() if limit_bytes is None else limit_bytes
    chunk = prefill_step_size * config.intermediate_size * ACTIVATIONS * itemsize
    if mx.default_device() == mx.cpu:  # no fused attention there: all scores of a chunk at once, twice
        chunk += 2 * config.num_attention_heads * prefill_step_size * 2 * prefill_step_size * 4
    budget = MemoryBudget(
        limit_bytes=limit,
        weights_bytes=weights_bytes,
        prefill_bytes=chunk,
        step_bytes=6 * config.vocab_size * 4,  # logits, log-probabilities and what sampling sorts
        kv_token_bytes=2 * config.num_hidden_layers * config.kv_heads * config.head_size * itemsize,
    )
    if weights_bytes >= limit:
        raise MemoryBudgetError(
            f"the weights take {_gb(weights_bytes)}; expected less than the budget of {_gb(limit)}; take a checkpoint of "
            f"fewer bits, or raise memory_budget_bytes"
        )
    return budget


def default_limit_bytes() -> int:
    """What MLX recommends as working set for the device, or three quarters of the system's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * SYSTEM_SHARE)


def _round_up(tokens: int) -> int:
    return -(-tokens // STEP_TOKENS) * STEP_TOKENS


def _gb(count: int) -> str:
    return f"{count / 1e9:.3f} GB"
