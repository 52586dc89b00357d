"""Which key a query may see: transformers' rules for 2-D and 4-D masks, packed positions and caches.

Source: transformers 5.23 `masking_utils.py`, as `create_causal_mask` behaves with sdpa attention.
"""

from __future__ import annotations

from typing import Any, Literal

import mlx.core as mx

from ..errors import InputError

Mask = mx.array | Literal["causal"] | None


def causal_mask(L: int, cache: Any | None) -> Mask:
    """The mask of a call without padding: "causal" or None where no array is needed, else what the cache says.

    Args:
        L: new tokens.
        cache: the first layer's cache, or None.
    """
    if cache is not None:
        mask: Mask = cache.make_mask(L, return_array=False, window_size=None)
        return mask
    return "causal" if L > 1 else None


def attention_mask_4d(
    attention_mask: mx.array, B: int, L: int, offset: int, dtype: mx.Dtype, *, has_cache: bool
) -> Mask:
    """Turns the caller's mask into what attention takes.

    Args:
        attention_mask: (B, keys) with nonzero for tokens to see, combined with the causal rule; or 4-D,
            (B or 1, heads or 1, L, offset + L), bool or additive, used as it is.
        offset: tokens in the cache.
        dtype: of the queries, which an additive mask is cast to.
        has_cache: a 2-D mask of another length is padded with 0 or cut only with a cache, as transformers does.

    Returns:
        bool or additive mask that broadcasts to (B, heads, L, offset + L), or "causal".

    Raises:
        InputError: the shape does not fit.
    """
    keys = offset + L
    if attention_mask.ndim == 4:
        return _given_mask(attention_mask, B, L, keys, dtype)
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B:
        raise InputError(
            f"attention_mask has shape {attention_mask.shape}; expected ({B}, {keys}) or 4 dimensions; "
            f"give one row for every row of the input"
        )
    visible = attention_mask != 0
    length = visible.shape[1]
    if not has_cache and length != keys:
        return _odd_length_mask(visible, keys)
    if length < keys:
        visible = mx.concatenate([visible, mx.zeros((B, keys - length), mx.bool_)], axis=1)
    queries = mx.arange(offset, keys)[:, None]
    return (queries >= mx.arange(keys)[None]) & visible[:, None, None, :keys]


def packed_mask(position_ids: mx.array) -> Mask:
    """Block-diagonal causal mask of packed sequences: a step of the positions other than +1 starts a new sequence.

    Args:
        position_ids: int, (B or 1, L).

    Returns:
        bool (B or 1, 1, L, L), or "causal" when every row is one sequence.
    """
    steps = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not steps.any().item():
        return "causal" if position_ids.shape[1] > 1 else None
    starts = mx.concatenate([mx.zeros((steps.shape[0], 1), mx.int32), steps.astype(mx.int32)], axis=1)
    sequence = mx.cumsum(starts, axis=1)
    index = mx.arange(position_ids.shape[1])
    same = sequence[:, :, None] == sequence[:, None, :]
    return (same & (index[:, None] >= index[None]))[:, None]


def _given_mask(mask: mx.array, B: int, L: int, keys: int, dtype: mx.Dtype) -> mx.array:
    if mask.shape[0] not in (1, B) or mask.shape[2] not in (1, L) or mask.shape[3] != keys:
        raise InputError(f"attention_mask has shape {mask.shape}; expected ({B} or 1, heads or 1, {L}, {keys})")
    if mask.dtype == mx.bool_:
        return mask
    # -inf in a fully masked row would become NaN and spread; half the least number is as invisible and stays finite.
    return mx.maximum(mask.astype(dtype), mx.finfo(dtype).min / 2)


def _odd_length_mask(visible: mx.array, keys: int) -> Mask:
    if visible[:, :keys].all().item() and not visible[:, keys:].any().item():
        return "causal" if keys > 1 else None
    raise InputError(
        f"attention_mask has length {visible.shape[1]}; expected {keys}, the number of tokens; cut or extend it"
    )
