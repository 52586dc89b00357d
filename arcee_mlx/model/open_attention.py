"""Attention with its probabilities in the open: for `output_attentions`, and for dropout in training."""

from __future__ import annotations

import mlx.core as mx

from ..errors import InputError
from .masks import Mask


def attend_openly(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask: Mask,
    *,
    scale: float,
    dropout: float = 0.0,
    key: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Computes what `mx.fast.scaled_dot_product_attention` computes, and gives the probabilities, too.

    Args:
        queries: (B, H, L, D).
        keys, values: (B, K, S, D).
        dropout: share of the probabilities that are dropped; the others grow by as much, as in torch.
        key: of the dropout; None takes MLX's global random state.

    Returns:
        (B, H, L, D), and the probabilities (B, H, L, S) after dropout, as transformers gives them.

    Raises:
        InputError: keys and values are of a quantized cache.
    """
    if not isinstance(keys, mx.array):
        raise InputError("output_attentions needs a float KV cache; got a quantized one; make_cache() gives one")
    B, H, L, D = queries.shape
    K, S = keys.shape[1:3]
    grouped = queries.reshape(B, K, -1, L, D)  # K groups of H/K queries
    scores = (grouped @ keys[:, :, None].swapaxes(-1, -2) * scale).reshape(B, H, L, S)
    hidden = mask.hidden
    if isinstance(hidden, str):
        hidden = mx.arange(S - L, S)[:, None] >= mx.arange(S)[None]
    if hidden is not None and hidden.dtype == mx.bool_:
        scores = mx.where(hidden, scores, mx.finfo(scores.dtype).min)
    elif hidden is not None:
        scores = scores + hidden
    probabilities = mx.softmax(scores, axis=-1, precise=True)
    if dropout:
        keep = mx.random.bernoulli(1 - dropout, probabilities.shape, key=key)
        probabilities = probabilities * keep / (1 - dropout)
    out = probabilities.reshape(grouped.shape[:-1] + (S,)) @ values[:, :, None]
    return out.reshape(B, H, L, D), probabilities
