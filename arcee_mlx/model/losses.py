"""Training losses, computed in float32 as transformers does.

Source: transformers 5.23 `loss/loss_utils.py`.
"""

from __future__ import annotations

import mlx.core as mx

from ..errors import InputError
from .inputs import as_integers, check_ids


def cross_entropy(
    logits: mx.array,
    labels: mx.array,
    *,
    num_items_in_batch: int | mx.array | None = None,
    ignore_index: int = -100,
) -> mx.array:
    """Mean negative log-likelihood over the labels that count, or their sum over `num_items_in_batch`.

    Args:
        logits: (N, V), any float dtype; computed in float32.
        labels: int (N,), ids below V or ignore_index.

    Returns:
        float32 scalar; NaN for a mean over no label at all, as in torch.

    Raises:
        InputError: the counts differ, or a label is out of range.
    """
    if labels.size != logits.shape[0]:
        raise InputError(f"labels hold {labels.size} values for {logits.shape[0]} rows of logits; expected as many")
    labels = as_integers(labels, "labels")
    counted = labels != ignore_index
    targets = mx.where(counted, labels, 0)
    check_ids(targets, 0, logits.shape[1], "labels")
    logits = logits.astype(mx.float32)
    scores = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    total = mx.where(counted, mx.logsumexp(logits, axis=1) - scores, 0).sum()
    return total / (counted.sum() if num_items_in_batch is None else num_items_in_batch)


def causal_loss(
    logits: mx.array,
    labels: mx.array | None,
    *,
    shift_labels: mx.array | None = None,
    num_items_in_batch: int | mx.array | None = None,
    ignore_index: int = -100,
) -> mx.array:
    """Next-token loss: `labels` shifted by one with `ignore_index` at the end, or `shift_labels` as they are.

    Args:
        logits: (..., V).
        labels: int (B, L); may be None when shift_labels is given.
        shift_labels: int, one for every row of logits.

    Raises:
        InputError: see `cross_entropy`.
    """
    if shift_labels is None:
        if labels is None:
            raise InputError("labels and shift_labels: expected one of them for a loss")
        labels = as_integers(mx.array(labels), "labels")
        end = mx.full((*labels.shape[:-1], 1), ignore_index, labels.dtype)
        shift_labels = mx.concatenate([labels[..., 1:], end], axis=-1)
    return cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        mx.array(shift_labels).reshape(-1),
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )
