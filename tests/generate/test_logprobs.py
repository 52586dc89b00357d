"""Log-probabilities: of the raw model, whatever else changes the logits, and only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import GenerateOptions, GenerationChunk
from arcee_mlx.generate import row

PROMPT = "Call me Ishmael."
Loaded = tuple[arcee_mlx.ArceeForCausalLM, arcee_mlx.Tokenizer]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def run(loaded: Loaded, **options: Any) -> list[GenerationChunk]:
    return list(arcee_mlx.stream_generate(*loaded, PROMPT, GenerateOptions(**options)))


def raw_logprobs(loaded: Loaded, tokens: list[int]) -> np.ndarray:
    """The slow obvious path: one full pass over prompt and answer; a row for every token of the answer."""
    model, tokenizer = loaded
    ids = tokenizer.encode(PROMPT)
    logits = model.forward(mx.array([ids + tokens])).logits[0, len(ids) - 1 : -1]
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


CHANGES: list[dict[str, Any]] = [
    {"temp": 0},
    {"temp": 1.3, "seed": 1, "top_k": 7},
    {"temp": 0, "repetition_penalty": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.4},
    {"temp": 0.8, "seed": 2, "logit_bias": {5: 3.0, 7: -9.0}, "xtc_probability": 0.5},
]


@pytest.mark.parametrize("options", CHANGES)
def test_they_are_those_of_a_full_pass_of_the_raw_model(loaded: Loaded, options: dict[str, Any]) -> None:
    chunks = run(loaded, max_tokens=12, logprobs=True, top_logprobs=4, **options)
    expected = raw_logprobs(loaded, [chunk.token for chunk in chunks])
    for chunk, logprobs in zip(chunks, expected, strict=True):
        assert chunk.logprob == pytest.approx(logprobs[chunk.token], abs=1e-4)
        best = np.argsort(-logprobs)[:4]
        assert [top.token for top in chunk.top_logprobs] == best.tolist()
        assert [top.logprob for top in chunk.top_logprobs] == pytest.approx(logprobs[best].tolist(), abs=1e-4)


@pytest.mark.parametrize("options", CHANGES)
def test_asking_for_them_does_not_change_the_tokens(loaded: Loaded, options: dict[str, Any]) -> None:
    plain = run(loaded, max_tokens=12, **options)
    asked = run(loaded, max_tokens=12, logprobs=True, top_logprobs=2, **options)
    assert [chunk.token for chunk in asked] == [chunk.token for chunk in plain]


def test_without_top_there_is_the_tokens_own_only(loaded: Loaded) -> None:
    chunks = run(loaded, max_tokens=3, temp=0, logprobs=True)
    assert all(chunk.logprob is not None and chunk.top_logprobs == () for chunk in chunks)


def test_all_tokens_may_be_asked_for(loaded: Loaded) -> None:
    (chunk,) = run(loaded, max_tokens=1, temp=0, logprobs=True, top_logprobs=400)
    assert sum(np.exp(top.logprob) for top in chunk.top_logprobs) == pytest.approx(1, abs=1e-4)


def test_nothing_is_computed_when_not_asked_for(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row, "LogprobRecorder", None)  # to make one would fail
    chunks = run(loaded, max_tokens=3, temp=0)
    assert all(chunk.logprob is None and chunk.top_logprobs == () for chunk in chunks)
