"""What is promised of a batch: scores within a stated noise of the single run's, the same text but at nearer ties."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import Answer, Engine, GenerateOptions

from conftest import write_checkpoint
from engine_data import (  # fmt: skip
    GREEDY,
    NOISE,
    OPTIONS,
    PATIENCE_S,
    PROMPTS,
    SAMPLED,
    Loaded,
    alone,
    endless,
    is_promised,
    run_on_owner,
)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint) as engine:
        yield engine


def together(engine: Engine, work: list[tuple[Any, GenerateOptions]]) -> list[Answer]:
    """All come in before anything is computed."""
    requests = run_on_owner(engine, lambda: [engine.submit(*each) for each in work])
    return [request.result(PATIENCE_S) for request in requests]


class Recorder:
    """A logits processor that keeps what the model computed."""

    def __init__(self) -> None:
        self.logits: list[np.ndarray] = []

    def __call__(self, _tokens: mx.array, logits: mx.array) -> mx.array:
        self.logits.append(np.array(logits[0]))
        return logits


@pytest.mark.parametrize("options", [replace(endless(40)), replace(SAMPLED, max_tokens=40)], ids=["greedy", "sampled"])
def test_eight_together_compute_what_each_computes_alone(
    engine: Engine, loaded: Loaded, options: GenerateOptions
) -> None:
    recorders = [(Recorder(), Recorder()) for _ in PROMPTS]

    def submit() -> list[arcee_mlx.Request]:
        return [
            engine.submit(prompt, options, logits_processors=[recorder])
            for prompt, (recorder, _) in zip(PROMPTS, recorders, strict=True)
        ]

    steps = engine.stats().decode_steps
    answers = [request.result(PATIENCE_S) for request in run_on_owner(engine, submit)]
    assert engine.stats().decode_steps - steps < 80  # they did decode together
    worst, spread, apart = 0.0, 0.0, 0
    for prompt, answer, (batched, single) in zip(PROMPTS, answers, recorders, strict=True):
        expected = alone(loaded, prompt, options, [single])
        apart += not is_promised(loaded, prompt, options, answer, expected)
        same = next(
            (i for i, pair in enumerate(zip(answer.tokens, expected.tokens, strict=False)) if pair[0] != pair[1]),
            len(expected.tokens) - 1,
        )
        for one, other in list(zip(batched.logits, single.logits, strict=False))[: same + 1]:
            finite = np.isfinite(one) & np.isfinite(other)
            worst = max(worst, float(np.abs(one - other)[finite].max()))
            spread = float(one[np.abs(one) < 1e6].std())
    print(
        f"\nnoise {worst:.2g} of logits with deviation {spread:.2g}; {apart} of {len(PROMPTS)} answers part at a near tie"
    )
    assert worst < NOISE


def test_requests_join_and_leave_at_different_times(engine: Engine, loaded: Loaded) -> None:
    """Each token of one answer brings another request in, and each of those has its own length."""
    lengths = [3, 17, 1, 9, 30, 2, 12, 5, 8, 21, 4, 26]
    later: list[tuple[int, arcee_mlx.Request]] = []

    def bring_one_in(_tokens: mx.array, logits: mx.array) -> mx.array:
        i = len(later)
        if i < len(lengths):
            later.append((i, engine.submit(PROMPTS[i % len(PROMPTS)], endless(lengths[i]))))
        return logits

    first = engine.submit(PROMPTS[4], endless(40), logits_processors=[bring_one_in])
    assert first.result(PATIENCE_S).tokens == alone(loaded, PROMPTS[4], endless(40)).tokens
    assert len(later) == len(lengths)
    for i, request in later:
        prompt, options = PROMPTS[i % len(PROMPTS)], endless(lengths[i])
        is_promised(loaded, prompt, options, request.result(PATIENCE_S), alone(loaded, prompt, options))


def test_all_kinds_of_options_decode_side_by_side(engine: Engine, loaded: Loaded) -> None:
    work = [(prompt, options) for prompt in PROMPTS[:4] for options in OPTIONS.values()]
    apart = 0
    for (prompt, options), answer in zip(work, together(engine, work), strict=True):
        expected = alone(loaded, prompt, options)
        apart += not is_promised(loaded, prompt, options, answer, expected)
        if answer.tokens == expected.tokens:
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=NOISE)
    print(f"\n{apart} of {len(work)} answers part at a near tie")


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 8.0}, "max_position_embeddings": 24},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 4.0,
            "original_max_position_embeddings": 24,
        },
        "max_position_embeddings": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_rows_of_length_dependent_rope_do_not_influence_each_other(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path / "m", **ROPES[kind])
    loaded = arcee_mlx.load(tmp_path / "m")
    long, short = [9, 8, 7] * 30, [9, 8, 7] * 3  # one on either side of the length, one beginning with the other
    prompts = [short, long, *PROMPTS, long[:24], long[:25], short]
    with Engine.load(tmp_path / "m", prefill_step_size=7) as engine:
        for _ in range(2):  # the second time all of it could come out of the prefix cache
            for options in (
                GREEDY,
                replace(SAMPLED, prefill_step_size=20),
                replace(GREEDY, kv_bits=8, kv_group_size=32),
            ):
                work = [(prompt, options) for prompt in prompts]
                for prompt, answer in zip(prompts, together(engine, work), strict=True):
                    expected = alone(loaded, prompt, options)
                    assert (answer.tokens, answer.text) == (expected.tokens, expected.text)
                for prompt in prompts:
                    assert engine.generate(prompt, options).tokens == alone(loaded, prompt, options).tokens
