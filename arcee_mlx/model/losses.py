"""Training losses, computed in float32 as transformers does.

Source: transformers 5.23 `loss/loss_utils.py`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from .inputs import as_integers, check_ids

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


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


def sequence_classification_loss(logits: mx.array, labels: mx.array, *, problem_type: str | None = None) -> mx.array:
    """The loss of one set of scores a sequence: cross entropy, BCE with logits, or the mean squared error.

    Args:
        logits: (B, N), any float dtype; computed in float32.
        labels: of a single-label problem int (B,) or (B, 1), -100 does not count; of a multi-label one float (B, N), from
            0 to 1; of a regression (B, N), or (B,) where N is 1.
        problem_type: one of `PROBLEM_TYPES`. None takes regression for one label; else the first for integers, multi-label
            for floats. (transformers keeps its first choice in the config; here every call decides.)

    Returns:
        float32 scalar.

    Raises:
        InputError: the problem type is none of these, or the labels do not fit it.
    """
    labels = mx.array(labels)
    N = logits.shape[1]
    if problem_type is None:
        many = "single_label" if mx.issubdtype(labels.dtype, mx.integer) else "multi_label"
        problem_type = "regression" if N == 1 else f"{many}_classification"
    if problem_type == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    if problem_type not in PROBLEM_TYPES:
        raise InputError(f"problem_type is {problem_type!r}; expected one of {', '.join(PROBLEM_TYPES)}; correct it")
    logits = logits.astype(mx.float32)
    if problem_type == "regression" and N == 1:
        logits, labels = logits.squeeze(), labels.squeeze()
    if labels.shape != logits.shape:
        raise InputError(f"labels have shape {labels.shape}; expected {logits.shape} for a {problem_type} loss")
    if problem_type == "regression":
        return nn.losses.mse_loss(logits, labels.astype(mx.float32), reduction="mean")
    if not mx.issubdtype(labels.dtype, mx.floating):
        raise InputError(f"labels have dtype {labels.dtype}; expected floats for a {problem_type} loss")
    return nn.losses.binary_cross_entropy(logits, labels.astype(mx.float32), with_logits=True, reduction="mean")


def question_answering_loss(
    start_logits: mx.array,
    end_logits: mx.array,
    start_positions: mx.array,
    end_positions: mx.array,
    *,
    num_items_in_batch: int | mx.array | None = None,
) -> mx.array:
    """Mean of the cross entropies of an answer's first and last token.

    Args:
        start_logits, end_logits: (B, L).
        start_positions, end_positions: int (B,) or (B, 1). One from L on does not count; a negative one counts as 0.
        num_items_in_batch: see `cross_entropy`.

    Raises:
        InputError: see `cross_entropy`.
    """
    losses = []
    for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
        B, L = logits.shape
        places = as_integers(mx.array(positions), "start_positions and end_positions")
        if places.shape not in ((B,), (B, 1)):
            raise InputError(f"start_positions or end_positions has shape {places.shape}; expected ({B},) or ({B}, 1)")
        places = mx.clip(places.reshape(-1), 0, L)
        losses.append(cross_entropy(logits, places, num_items_in_batch=num_items_in_batch, ignore_index=L))
    return (losses[0] + losses[1]) / 2
