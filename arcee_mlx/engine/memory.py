"""What requests will take at their full length, and whether that fits the budget. Predicted, so that nothing is tried."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from ..errors import InputError, MemoryBudgetError
from ..generate.request import Request as CheckedRequest
from ..model.config import ArceeConfig
from ..model.linear import PIECE_BYTES

STEP_TOKENS = 256  # mlx-lm's caches grow by so many, from wherever they stand
SYSTEM_SHARE = 0.75  # of the system's memory, where MLX names no working set
FUSED_HEADS = (64, 80, 128)  # widths for which a GPU needs no array of scores
# Measured on the CPU backend, which makes arrays a few operations before they are filled.
UP_ARRAYS, WIDE_ARRAYS, SCORE_ARRAYS, LAYERS_TWICE = 2, 10, 1.25, 2
UNPACKED_ARRAYS, PIECES_AHEAD = 3, 32  # of a quantized layer, or of so many pieces of one
LOGITS_ARRAYS, SAMPLING_ARRAYS = 8, 14  # of a row, and of the row whose token is drawn


@dataclass(frozen=True)
class RequestSize:
    """What a request needs of memory.

    Attributes:
        kv_bytes: keys and values at full length.
        prefill_bytes: activations while one chunk of its prompt is read.
        is_alone: whether it has its own cache to the end; others share one, padded to the longest of them.
    """

    kv_bytes: int
    prefill_bytes: int
    is_alone: bool


@dataclass(frozen=True)
class MemoryBudget:
    """The limit, and what predictions start from.

    Attributes:
        limit_bytes: of all that MLX may hold for the engine.
        weights_bytes: of the model.
        itemsize: bytes of a key, a value or an activation.
        prefill_step_size: tokens of a chunk at most.
        config: of the model.
    """

    limit_bytes: int
    weights_bytes: int
    itemsize: int
    prefill_step_size: int
    config: ArceeConfig

    def measure(self, checked: CheckedRequest) -> RequestSize:
        """What a request needs at full length."""
        config, options, prompt = self.config, checked.options, len(checked.ids)
        chunk = min(prompt, options.prefill_step_size, self.prefill_step_size)
        tokens = prompt + checked.limit
        if options.max_kv_size is not None:
            tokens, prompt = (min(n, options.max_kv_size + chunk) for n in (tokens, prompt))
        numbers = 2 * config.num_hidden_layers * config.kv_heads * config.head_size
        token_bytes = numbers * self.itemsize
        if options.kv_bits is not None:  # and a scale and a bias for each group
            token_bytes = numbers * options.kv_bits // 8 + 2 * self.itemsize * numbers // options.kv_group_size
        wide = max(config.hidden_size, config.num_attention_heads * config.head_size)
        prefill = chunk * self.itemsize * (UP_ARRAYS * config.intermediate_size + WIDE_ARRAYS * wide)
        if options.kv_bits is not None or mx.default_device() == mx.cpu or config.head_size not in FUSED_HEADS:
            prefill += int(SCORE_ARRAYS * config.num_attention_heads * chunk * prompt * 4)
        if sys.platform == "linux" and mx.default_device() == mx.cpu:  # weights are unpacked piece by piece
            layer = 4 * config.hidden_size * config.intermediate_size
            prefill += UNPACKED_ARRAYS * min(PIECES_AHEAD * PIECE_BYTES, layer)
        is_alone = options.kv_bits is not None or options.max_kv_size is not None
        return RequestSize((tokens + STEP_TOKENS) * token_bytes, prefill, is_alone)

    def predict(self, sizes: Sequence[RequestSize], cached_bytes: int = 0) -> int:
        """The peak with these requests at full length: weights, cache of prefixes, keys and values, transient copies."""
        together = [size.kv_bytes for size in sizes if not size.is_alone]
        shared, alone = len(together) * max(together, default=0), [size.kv_bytes for size in sizes if size.is_alone]
        # One row is copied whole as it joins, or leaves for the cache of prefixes; the shared cache layer by layer.
        passing = max([*together, *(size.prefill_bytes for size in sizes)], default=0)
        copied = LAYERS_TWICE * max([shared, *alone]) // self.config.num_hidden_layers
        logits = (LOGITS_ARRAYS * len(sizes) + SAMPLING_ARRAYS) * self.config.vocab_size * 4
        return self.weights_bytes + cached_bytes + shared + sum(alone) + passing + copied + logits

    def check_alone(self, checked: CheckedRequest) -> None:
        """Raises MemoryBudgetError where a request cannot fit even with nothing beside it."""
        size = self.measure(checked)
        needed = self.predict([size])
        if needed > self.limit_bytes:
            raise MemoryBudgetError(
                f"the request needs {_words(needed)} at its full length of {len(checked.ids) + checked.limit} tokens (weights "
                f"{_words(self.weights_bytes)}, keys and values {_words(size.kv_bytes)}, the rest while they are computed); "
                f"expected at most the budget of {_words(self.limit_bytes)}; {self._advise(checked)}"
                f"raise memory_budget_bytes to {needed}"
            )

    def check_beside(self, size: RequestSize, others: Sequence[RequestSize]) -> None:
        """Raises MemoryBudgetError where a request cannot begin before others have ended."""
        needed = self.predict([*others, size])
        if needed > self.limit_bytes:
            raise MemoryBudgetError(
                f"the request and the {len(others)} before it need {_words(needed)} at full length, "
                f"{_words(self.predict(others))} without it; expected at most the budget of {_words(self.limit_bytes)}; let it "
                f"wait, lower max_tokens, or raise memory_budget_bytes to {needed}"
            )

    def _advise(self, checked: CheckedRequest) -> str:
        """What would make it fit, each by itself."""

        def fits(**changes: int) -> bool:
            return self.predict([self.measure(_change(checked, **changes))]) <= self.limit_bytes

        advice = []
        if fits(limit=1):
            advice.append(f"lower max_tokens to {_largest(lambda n: fits(limit=n), checked.limit)}")
        elif fits(prompt=1, limit=1):
            prompt = _largest(lambda n: fits(prompt=n, limit=1), len(checked.ids))
            advice.append(f"shorten the prompt of {len(checked.ids)} tokens to {prompt} with max_tokens 1")
        if checked.options.max_kv_size is None:
            bits = [bits for bits in (8, 4, 2) if bits < (checked.options.kv_bits or 9) and fits(kv_bits=bits)]
            if bits and self.config.head_size % checked.options.kv_group_size == 0:
                advice.append(f"set kv_bits to {bits[0]}")
        return "".join(f"{each}, or " for each in advice)


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
    if weights_bytes >= limit:
        raise MemoryBudgetError(
            f"the weights take {_words(weights_bytes)}; expected less than the budget of {_words(limit)}; take a checkpoint "
            f"of fewer bits, or raise memory_budget_bytes"
        )
    return MemoryBudget(limit, weights_bytes, itemsize, prefill_step_size, config)


def default_limit_bytes() -> int:
    """What MLX recommends as working set for the device, or three quarters of the system's memory."""
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * SYSTEM_SHARE)


def _change(
    checked: CheckedRequest, *, prompt: int | None = None, limit: int | None = None, kv_bits: int | None = None
) -> CheckedRequest:
    options = checked.options if kv_bits is None else replace(checked.options, kv_bits=kv_bits)
    return replace(checked, ids=checked.ids[:prompt], limit=limit or checked.limit, options=options)


def _largest(fits: Callable[[int], bool], too_many: int) -> int:
    """The largest number that fits; 1 does, `too_many` does not."""
    fitting = 1
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def _words(count: int) -> str:
    return f"{count / 1e9:.3f} GB" if count >= 1e8 else f"{count / 1e6:.3f} MB"
