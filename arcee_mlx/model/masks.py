"""Which key a query may see: transformers' rules for 2-D and 4-D masks, packed positions and caches.

Source: transformers 5.23 `masking_utils.py`, as `create_causal_mask` behaves with sdpa attention.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import mlx.core as mx

from ..errors import InputError


class Mask(NamedTuple):
    """What attention hides.

    Attributes:
        hidden: "causal", None for nothing, or bool (True = visible) or additive, broadcasting to (B, H, L, S).
        sees: bool (B or 1, H or 1, L, 1), which queries see any key; None where all do. torch's attention gives 0 for
            one that sees none; MLX's gives the mean of all values.
    """

    hidden: mx.array | Literal["causal"] | None
    sees: mx.array | None = None


def causal_mask(L: int, cache: Any | None) -> Mask:
    """The mask of a call without padding: "causal" or None where no array is needed, else what the cache says.

    Args:
        L: new tokens.
        cache: the first layer's cache, or None.
    """
    if cache is not None:
        return Mask(cache.make_mask(L, return_array=False, window_size=None))
    return Mask("causal" if L > 1 else None)


def attention_mask_4d(
    attention_mask: mx.array, B: int, H: int, L: int, offset: int, dtype: mx.Dtype, *, has_cache: bool
) -> Mask:
    """Turns the caller's mask into what attention takes.

    Args:
        attention_mask: (B, keys) with nonzero for tokens to see, combined with the causal rule; or 4-D,
            (B or 1, H or 1, L, offset + L), bool or additive, used as it is.
        offset: tokens in the cache.
        dtype: of the queries, which an additive mask is cast to.
        has_cache: a 2-D mask of another length is padded with 0 or cut only with a cache, as transformers does.

    Raises:
        InputError: the shape does not fit.
    """
    keys = offset + L
    if attention_mask.ndim == 4:
        return _given_mask(attention_mask, B, H, L, keys, dtype)
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
    seen = (queries >= mx.arange(keys)[None]) & visible[:, None, None, :keys]
    return Mask(seen, seen.any(axis=-1, keepdims=True))


def packed_mask(position_ids: mx.array) -> Mask:
    """Block-diagonal causal mask of packed sequences: a step of the positions other than +1 starts a new sequence.

    Args:
        position_ids: int, (B or 1, L).
    """
    steps = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not steps.any().item():
        return Mask("causal" if position_ids.shape[1] > 1 else None)
    starts = mx.concatenate([mx.zeros((steps.shape[0], 1), mx.int32), steps.astype(mx.int32)], axis=1)
    sequence = mx.cumsum(starts, axis=1)
    index = mx.arange(position_ids.shape[1])
    same = sequence[:, :, None] == sequence[:, None, :]
    return Mask((same & (index[:, None] >= index[None]))[:, None])


def _given_mask(mask: mx.array, B: int, H: int, L: int, keys: int, dtype: mx.Dtype) -> Mask:
    b, h, length, k = mask.shape
    if b not in (1, B) or h not in (1, H) or length not in (1, L) or k != keys:
        raise InputError(f"attention_mask has shape {mask.shape}; expected ({B} or 1, {H} or 1, {L} or 1, {keys})")
    if mask.dtype == mx.bool_:
        return Mask(mask, mask.any(axis=-1, keepdims=True))
    if not mx.issubdtype(mask.dtype, mx.floating):
        raise InputError(f"attention_mask has dtype {mask.dtype}; expected bool, or a float to be added to the scores")
    # Half the least number hides as well as -inf and cannot become NaN where a query sees nothing.
    sees = (mask > -mx.inf).any(axis=-1, keepdims=True)
    return Mask(mx.maximum(mask.astype(dtype), mx.finfo(dtype).min / 2), sees)


def _odd_length_mask(visible: mx.array, keys: int) -> Mask:
    """A mask of another length than the input is fine where it hides nothing, as in transformers."""
    everything = keys == 1 and visible.all().item()
    if everything or (visible[:, :keys].all().item() and not visible[:, keys:].any().item()):
        return Mask("causal" if keys > 1 else None)
    raise InputError(
        f"attention_mask has length {visible.shape[1]}; expected {keys}, the number of tokens; cut or extend it"
    )
