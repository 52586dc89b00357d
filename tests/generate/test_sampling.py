"""Sampling: transformers' filters, a key of its own for every step, no global random state."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcee_mlx import GenerateOptions
from arcee_mlx.generate.sampling import Sampler, filter_scores, make_logits_processors


def make_sampler(**options: object) -> Sampler:
    values = {"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0} | options
    return Sampler(GenerateOptions(**values))  # type: ignore[arg-type]


def scores(seed: int = 0, rows: int = 1, size: int = 50) -> mx.array:
    return mx.random.normal((rows, size), key=mx.random.key(seed)) * 3


def kept_by_oracle(row: np.ndarray, top_k: int, top_p: float, min_p: float) -> set[int]:
    order = np.argsort(-row, kind="stable")
    kept = list(order[:top_k]) if top_k else list(order)
    p = np.exp(row[kept] - row[kept].max())
    p /= p.sum()
    if top_p < 1:  # the smallest set of the likeliest whose mass reaches top_p
        count = int(np.searchsorted(np.cumsum(p), top_p, side="left")) + 1
        kept, p = kept[:count], p[:count] / p[:count].sum()
    return {int(i) for i, probability in zip(kept, p, strict=True) if probability >= min_p * p.max()}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([0, 1, 5, 49, 50, 80]),
    st.sampled_from([1.0, 0.99, 0.7, 0.2, 1e-6]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)
def test_filters_keep_what_an_independent_count_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    x = scores(seed)
    kept = np.array(filter_scores(x, top_k=top_k, top_p=top_p, min_p=min_p))[0] > -np.inf
    assert set(np.flatnonzero(kept)) == kept_by_oracle(np.array(x, np.float64)[0], top_k, top_p, min_p)


def test_temperature_zero_takes_the_likeliest() -> None:
    x = scores(rows=3)
    assert make_sampler(temp=0.0)(x).tolist() == mx.argmax(x, axis=-1).tolist()


def test_the_same_seed_draws_the_same_tokens_and_another_does_not() -> None:
    x = scores()

    def draw(seed: int) -> list[int]:
        sampler = make_sampler(seed=seed)
        return [int(sampler(x).item()) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert len(set(draw(1))) > 3  # every step has a key of its own


def test_draws_follow_the_tempered_distribution() -> None:
    x = mx.array([[0.0, 1.0, 2.0, 3.0]])
    sampler = make_sampler(temp=2.0, seed=7)
    counts = np.bincount([sampler(x).item() for _ in range(2000)], minlength=4) / 2000
    np.testing.assert_allclose(counts, np.array(mx.softmax(x / 2.0))[0], atol=0.04)


def test_sampling_leaves_the_global_random_state_alone() -> None:
    mx.random.seed(5)
    before = mx.random.state[0].tolist()
    sampler = make_sampler(top_k=5, top_p=0.9, min_p=0.1)
    for _ in range(3):
        sampler(scores()).item()
    assert mx.random.state[0].tolist() == before


def test_the_repetition_penalty_sees_the_whole_context() -> None:
    options = GenerateOptions(repetition_penalty=2.0)
    (penalize,) = make_logits_processors(options, vocab_size=6, model_vocab_size=6)
    tokens = mx.array([1, 2] + [0] * 100)
    out = penalize(tokens, mx.array([[4.0, 2.0, -2.0, 1.0, 0.0, -1.0]]))
    assert out.tolist() == [[2.0, 1.0, -4.0, 1.0, 0.0, -1.0]]


def test_rows_beyond_the_tokenizers_vocabulary_are_never_drawn() -> None:
    (mask,) = make_logits_processors(GenerateOptions(), vocab_size=3, model_vocab_size=5)
    out = mask(mx.array([0]), mx.array([[0.0, 1.0, 2.0, 9.0, 9.0]]))
    assert out.tolist() == [[0.0, 1.0, 2.0, -np.inf, -np.inf]]
    assert make_logits_processors(GenerateOptions(), vocab_size=5, model_vocab_size=5) == []


@pytest.mark.parametrize("options", [{"top_k": 10**9}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_extreme_filters_leave_something_to_draw(options: dict[str, float]) -> None:
    token = make_sampler(**options)(scores()).item()
    assert 0 <= token < 50
