"""Requests that decode together: each gets what it would get alone, whoever joins and leaves beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import DEMO_MODEL, Answer, Engine, GenerateOptions, Request

from conftest import write_checkpoint
from engine_script import GREEDY, LONG, Gate, Loaded, Work, alone, said

PROMPTS: list[Any] = [
    "Call me Ishmael.",
    "The sea is",
    [{"role": "user", "content": "Where is the whale?"}],
    "Some years ago, never mind how long precisely, having little or no money in my purse, I thought I would",
    [7],
    "The captain said that",
    "It was a dark night, and",
    "Once upon a time there was a ship whose crew",
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(DEMO_MODEL) as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return arcee_mlx.load(DEMO_MODEL)


def answer_together(engine: Engine, prompts: list[Any], each: list[GenerateOptions]) -> list[Answer]:
    """All of them wait when the first is at its first token."""
    gate = Gate()
    first = engine.submit(prompts[0], each[0], logits_processors=[gate])
    gate.wait()
    requests = [first, *(engine.submit(*both) for both in zip(prompts[1:], each[1:], strict=True))]
    gate.open()
    return [request.result() for request in requests]


def test_scores_of_eight_together_are_those_of_one_by_one_within_the_noise(engine: Engine, loaded: Loaded) -> None:
    options = replace(GREEDY, max_tokens=16, logprobs=True, top_logprobs=50, logit_bias={1: -100, 3: -100})
    before = engine.stats()
    answers = answer_together(engine, PROMPTS, [options] * 8)
    after = engine.stats()
    served = (after.generated_tokens - before.generated_tokens) / (after.decode_steps - before.decode_steps)
    assert served > 5
    noise, apart = 0.0, []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        single = alone(loaded, prompt, options)
        pairs = enumerate(zip(answer.tokens, single.tokens, strict=True))
        same = next((place for place, (token, expected) in pairs if token != expected), len(single.tokens))
        for one, other in zip(answer.top_logprobs[: same + 1], single.top_logprobs[: same + 1], strict=True):
            scores, expected = ({top.token: top.logprob for top in tops} for tops in (one, other))
            noise = max(noise, *(abs(scores[token] - expected[token]) for token in scores.keys() & expected.keys()))
        if same < len(single.tokens):
            best, second = single.top_logprobs[same][:2]
            apart.append(best.logprob - second.logprob)
    spread = float(np.std([top.logprob for top in single.top_logprobs[0]]))
    print(
        f"\n{served:.1f} answers a step; noise {noise:.2g} of log-probabilities with deviation {spread:.2g}; "
        f"{len(apart)} of 8 answers differ, their two best tokens {apart} apart"
    )
    assert noise < 1e-4 * spread and all(gap <= 2 * noise for gap in apart)


def test_eight_with_options_of_their_own_are_as_one_by_one(engine: Engine, loaded: Loaded) -> None:
    sampled = GenerateOptions(max_tokens=12, temp=1.0, top_k=50)
    each = [
        sampled,
        replace(sampled, repetition_penalty=1.3, frequency_penalty=0.5),
        replace(sampled, min_p=0.05, logit_bias={300: 5.0}),
        replace(sampled, kv_bits=8),
        replace(sampled, max_tokens=3),
        replace(sampled, max_kv_size=16),
        replace(sampled, stop=("e",), max_tokens=30),
        replace(sampled, temp=0.0, top_k=None, logprobs=True),
    ]
    each = [replace(options, seed=20 + i) for i, options in enumerate(each)]
    for prompt, options, answer in zip(PROMPTS, each, answer_together(engine, PROMPTS, each), strict=True):
        expected = alone(loaded, prompt, options)
        assert said(answer) == said(expected)
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_rows_join_and_leave_while_others_run(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = arcee_mlx.load(checkpoint)
    prompts = [[10 + i, *range(20, 22 + 9 * (i % 4))] for i in range(12)]
    each = [replace(LONG, temp=float(i % 2), seed=i, max_tokens=3 + 7 * (i % 5)) for i in range(12)]
    requests: list[Request] = []
    with Engine.load(checkpoint, max_batch_size=3, prefill_step_size=8) as engine:
        work = Work(monkeypatch)

        def join() -> None:
            if len(requests) < 12 and work.steps % 3 == 0:
                requests.append(engine.submit(prompts[len(requests)], each[len(requests)]))

        requests.append(engine.submit(prompts[0], each[0]))
        work.at_step = join
        while len(requests) < 12 or not all(request.has_ended for request in requests):
            if all(request.has_ended for request in requests):
                join()  # nothing steps any more
            requests[-1].result()
        stats = engine.stats()
    assert stats.generated_tokens > stats.decode_steps  # they did share steps
    for prompt, options, request in zip(prompts, each, requests, strict=True):
        assert said(request.result()) == said(alone(loaded, prompt, options))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_requests_of_length_dependent_rope_do_not_influence_each_other(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 8.0}
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 4.0}
        rope["original_max_position_embeddings"] = 24
    write_checkpoint(tmp_path / "m", rope_parameters=rope, max_position_embeddings=256 if kind == "longrope" else 24)
    loaded = arcee_mlx.load(tmp_path / "m")
    # Some stay below the original 24 positions, some cross it while they decode, some begin beyond.
    prompts = [[40 + i, *range(60, 60 + length)] for i, length in enumerate((3, 10, 20, 30, 60, 5))]
    options = replace(LONG, max_tokens=16)
    expected = [said(alone(loaded, prompt, options)) for prompt in prompts]
    with Engine.load(tmp_path / "m", prefill_step_size=16) as engine:
        together = answer_together(engine, prompts, [options] * 6)
        assert [said(answer) for answer in together] == expected
        for i in (4, 0, 3, 2):  # one behind the other, and again
            assert said(engine.generate(prompts[i], options)) == expected[i]
        longer = [*prompts[1], *range(100, 120)]
        assert said(engine.generate(longer, options)) == said(alone(loaded, longer, options))
        slow = engine.stream(prompts[2], options, buffer_chunks=2)
        chunks = [next(slow)]
        assert said(engine.generate(prompts[4], options)) == expected[4]  # while the other is paused
        assert tuple(chunk.token for chunk in [*chunks, *slow]) == expected[2][1]
