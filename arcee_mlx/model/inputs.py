"""The caller's arrays at the door of `forward`: shapes, and ids in range, since MLX checks no bounds when it gathers."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import InputError
from .config import ArceeConfig


class Embedded(NamedTuple):
    """Embeddings (B, L, E) with their row and token counts."""

    h: mx.array
    B: int
    L: int


def as_integers(ids: mx.array, name: str) -> mx.array:
    """Signed ids, so that comparing them with a negative number means what it says.

    Raises:
        InputError: they are not integers.
    """
    if not mx.issubdtype(ids.dtype, mx.integer):
        raise InputError(f"{name} has dtype {ids.dtype}; expected integers")
    return ids if mx.issubdtype(ids.dtype, mx.signedinteger) else ids.astype(mx.int64)


def check_ids(ids: mx.array, least: int, end: int, name: str) -> None:
    """Checks that every id is in [least, end).

    Inside mx.compile or another transformation the values are not known and the check is left to the caller.

    Raises:
        InputError: not integers, or out of range; names the argument and the first offending values.
    """
    ids = as_integers(ids, name)
    if ids.size == 0:
        return
    try:
        low, high = int(ids.min()), int(ids.max())
    except (ValueError, RuntimeError) as error:
        if "[eval]" in str(error):
            return
        raise
    if low < least or high >= end:
        bad = low if low < least else high
        raise InputError(f"{name} holds {bad}; expected ids from {least} to {end - 1}; check which tokenizer made them")


def read_inputs(
    input_ids: mx.array | None, inputs_embeds: mx.array | None, embed_tokens: nn.Module, config: ArceeConfig
) -> Embedded:
    """Embeddings of the ids, or the given embeddings.

    Raises:
        InputError: none or both were given, or the shape or an id is wrong.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("input_ids and inputs_embeds: expected exactly one of them")
    if input_ids is None:
        assert inputs_embeds is not None
        h = mx.array(inputs_embeds)
        if h.ndim != 3 or h.shape[2] != config.hidden_size:
            raise InputError(f"inputs_embeds has shape {h.shape}; expected (rows, tokens, {config.hidden_size})")
    else:
        ids = mx.array(input_ids)
        if ids.ndim != 2:
            raise InputError(f"input_ids has shape {ids.shape}; expected (rows, tokens)")
        check_ids(ids, 0, config.vocab_size, "input_ids")
        h = embed(ids, embed_tokens, config)
    if 0 in h.shape[:2]:
        raise InputError(f"the input has {h.shape[0]} rows of {h.shape[1]} tokens; expected at least one of each")
    return Embedded(h, h.shape[0], h.shape[1])


def embed(ids: mx.array, embed_tokens: nn.Module, config: ArceeConfig) -> mx.array:
    """Embeddings (B, L, E) of ids (B, L). As with torch's padding_idx, looking the pad token up does not train its row."""
    h = embed_tokens(ids)
    if config.pad_token_id is None:
        return h
    is_pad = ids == config.pad_token_id % config.vocab_size
    return mx.where(is_pad[..., None], mx.stop_gradient(h), h)


def read_positions(
    position_ids: mx.array | None, B: int, L: int, offset: int | mx.array
) -> tuple[mx.array, int | None]:
    """Positions (B or 1, L) of the new tokens, and the largest plus one where it is known without computing.

    Raises:
        InputError: the shape does not fit.
    """
    if position_ids is None:
        if isinstance(offset, int):
            return mx.arange(offset, offset + L)[None], offset + L
        return offset[:, None] + mx.arange(L)[None], None
    positions = mx.array(position_ids)
    if positions.ndim != 2 or positions.shape[0] not in (1, B) or positions.shape[1] != L:
        raise InputError(f"position_ids has shape {positions.shape}; expected ({B}, {L}) or (1, {L})")
    return positions, None


def keep_rows(h: mx.array, logits_to_keep: int | mx.array) -> mx.array:
    """Picks the hidden states (B, L, E) that `logits_to_keep` asks for; see `ArceeForCausalLM.forward`.

    Raises:
        InputError: the shape does not fit or an index is out of range.
    """
    if isinstance(logits_to_keep, int):
        return h[:, slice(-logits_to_keep, None)]
    keep = mx.array(logits_to_keep)
    B, L, E = h.shape
    if keep.dtype == mx.bool_:
        rows = keep if keep.ndim == 2 else mx.broadcast_to(keep[None], (B, L)) if keep.shape == (L,) else None
        if rows is None or rows.shape != (B, L):
            raise InputError(
                f"logits_to_keep has shape {keep.shape}; expected a bool mask of shape ({B}, {L}) or ({L},)"
            )
        index = mx.array(np.flatnonzero(np.array(rows)))
        kept_rows = h.reshape(B * L, E)[index]
        return kept_rows if keep.ndim == 2 else kept_rows.reshape(B, -1, E)
    if keep.ndim == 1:
        check_ids(keep, -L, L, "logits_to_keep")
        return h[:, keep]
    if keep.ndim != 2 or keep.shape[0] not in (1, B):
        raise InputError(f"logits_to_keep has shape {keep.shape}; expected (n,) or ({B}, n)")
    check_ids(keep, -L, L, "logits_to_keep")
    keep = mx.where(keep < 0, keep + L, keep)
    return mx.take_along_axis(h, mx.broadcast_to(keep, (B, keep.shape[1]))[..., None], axis=1)
