"""The causal loss against a float64 oracle."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.errors import InputError
from arcee_mlx.model.losses import causal_loss, cross_entropy

B, L, V = 3, 7, 11


def oracle(logits: np.ndarray, targets: np.ndarray, ignore: int = -100, items: float | None = None) -> float:
    logits, targets = logits.reshape(-1, logits.shape[-1]).astype(np.float64), targets.reshape(-1)
    top = logits.max(axis=1, keepdims=True)
    scores = logits - top - np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    kept = targets != ignore
    total = -scores[np.arange(len(targets))[kept], targets[kept]].sum()
    return total / (kept.sum() if items is None else items)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(B, L, V)).astype(np.float32) * 3


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.random.default_rng(1).integers(0, V, (B, L))
    labels[0, 4:] = -100
    return labels


def shifted(labels: np.ndarray, ignore: int = -100) -> np.ndarray:
    return np.concatenate([labels[:, 1:], np.full((len(labels), 1), ignore)], axis=1)


def test_position_i_is_compared_with_label_i_plus_one(logits: np.ndarray, labels: np.ndarray) -> None:
    got = causal_loss(mx.array(logits), mx.array(labels))
    assert got.dtype == mx.float32 and got.shape == ()
    assert got.item() == pytest.approx(oracle(logits, shifted(labels)), rel=1e-6)


def test_last_position_and_first_label_do_not_count(logits: np.ndarray, labels: np.ndarray) -> None:
    other, moved = labels.copy(), logits.copy()
    other[:, 0] = (other[:, 0] + 1) % V
    moved[:, -1] = 100 * moved[:, -1]
    assert (
        causal_loss(mx.array(moved), mx.array(other)).item() == causal_loss(mx.array(logits), mx.array(labels)).item()
    )


def test_shift_labels_are_used_unshifted_instead_of_labels(logits: np.ndarray, labels: np.ndarray) -> None:
    expected = pytest.approx(oracle(logits, labels), rel=1e-6)
    assert causal_loss(mx.array(logits), None, shift_labels=mx.array(labels)).item() == expected
    assert causal_loss(mx.array(logits), mx.zeros((1,), mx.int32), shift_labels=mx.array(labels)).item() == expected


@pytest.mark.parametrize("items", [1, 7, 100, mx.array(7), mx.array(2.5)], ids=str)
def test_number_of_items_divides_the_sum(logits: np.ndarray, labels: np.ndarray, items: Any) -> None:
    expected = oracle(logits, shifted(labels), items=float(items) if isinstance(items, int) else items.item())
    assert causal_loss(mx.array(logits), mx.array(labels), num_items_in_batch=items).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("ignore", [-1, 0, 5, -100, 99])
def test_ignored_index_does_not_count(logits: np.ndarray, ignore: int) -> None:
    labels = np.random.default_rng(2).integers(0, V, (B, L))
    labels[1, 2:5] = ignore
    got = causal_loss(mx.array(logits), mx.array(labels), ignore_index=ignore).item()
    assert got == pytest.approx(oracle(logits, shifted(labels, ignore), ignore=ignore), rel=1e-6)


def test_nothing_but_ignored_labels_is_nan_as_a_mean_and_zero_as_a_sum(logits: np.ndarray) -> None:
    nothing = mx.full((B, L), -100, mx.int32)
    assert np.isnan(causal_loss(mx.array(logits), nothing).item())
    assert causal_loss(mx.array(logits), nothing, num_items_in_batch=3).item() == 0


@pytest.mark.parametrize("dtype", [mx.int8, mx.int32, mx.int64, mx.uint32, mx.uint8])
def test_labels_of_any_integer_type_mean_the_same(logits: np.ndarray, dtype: mx.Dtype) -> None:
    labels = np.random.default_rng(1).integers(0, V, (B, L))
    got = causal_loss(mx.array(logits), mx.array(labels).astype(dtype)).item()
    assert got == pytest.approx(oracle(logits, shifted(labels)), rel=1e-6)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_logits_are_taken_to_float32_first(
    logits: np.ndarray, labels: np.ndarray, dtype: mx.Dtype
) -> None:
    half = mx.array(logits).astype(dtype)
    exact = oracle(np.array(half.astype(mx.float32)), shifted(labels))
    assert causal_loss(half, mx.array(labels)).item() == pytest.approx(exact, rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = mx.array([[1e4, -1e4, 0.0], [3e38, 0.0, 0.0]])
    got = cross_entropy(logits, mx.array([0, 0]))
    assert got.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("bad", [V, -1, 10**6, -101])
def test_label_out_of_range_is_refused_and_named(logits: np.ndarray, bad: int) -> None:
    labels = np.zeros((B, L), np.int64)
    labels[1, 3] = bad
    with pytest.raises(InputError, match=f"labels holds {bad}"):
        causal_loss(mx.array(logits), mx.array(labels))


@pytest.mark.parametrize("labels", [mx.zeros((B, L)), mx.zeros((B, L), mx.bool_)], ids=["float", "bool"])
def test_labels_that_are_not_integers_are_refused(logits: np.ndarray, labels: mx.array) -> None:
    with pytest.raises(InputError, match="integers"):
        causal_loss(mx.array(logits), labels)


@pytest.mark.parametrize("shape", [(B, L - 1), (B - 1, L), (1, 1)])
def test_labels_of_another_count_are_refused(logits: np.ndarray, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="labels hold"):
        causal_loss(mx.array(logits), mx.zeros(shape, mx.int32))


def test_gradient_is_softmax_minus_one_hot_over_the_count(logits: np.ndarray, labels: np.ndarray) -> None:
    gradient = np.array(mx.grad(lambda x: causal_loss(x, mx.array(labels)))(mx.array(logits)))
    targets, flat = shifted(labels).reshape(-1), logits.reshape(-1, V).astype(np.float64)
    soft = np.exp(flat - flat.max(1, keepdims=True))
    soft /= soft.sum(1, keepdims=True)
    kept = targets != -100
    soft[np.arange(len(targets))[kept], targets[kept]] -= 1
    expected = np.where(kept[:, None], soft, 0) / kept.sum()
    np.testing.assert_allclose(gradient.reshape(-1, V), expected, atol=1e-6)
    assert not gradient[:, -1].any()


def test_loss_compiles(logits: np.ndarray, labels: np.ndarray) -> None:
    compiled = mx.compile(lambda x, y: causal_loss(x, y))
    assert compiled(mx.array(logits), mx.array(labels)).item() == pytest.approx(
        causal_loss(mx.array(logits), mx.array(labels)).item(), rel=1e-6
    )
