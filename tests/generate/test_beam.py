"""beam_search against a search by hand, and what it refuses. Equality with transformers: tests/parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import GenerateOptions, InputError

Loaded = tuple[arcee_mlx.ArceeForCausalLM, arcee_mlx.Tokenizer]
PROMPT = "Call me Ishmael."


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def logprobs_after(loaded: Loaded, ids: list[int]) -> np.ndarray:
    logits = np.array(loaded[0].forward(mx.array([ids])).logits[0, -1], np.float64)
    return logits - np.log(np.exp(logits).sum())


def test_one_beam_is_the_greedy_answer(loaded: Loaded) -> None:
    options = GenerateOptions(max_tokens=20, temp=0)
    (beam,) = arcee_mlx.beam_search(*loaded, PROMPT, options, num_beams=1)
    chunks = list(arcee_mlx.stream_generate(*loaded, PROMPT, options))
    assert beam.tokens == tuple(chunk.token for chunk in chunks)
    assert (beam.text, beam.stop_reason) == ("".join(chunk.text for chunk in chunks), chunks[-1].stop_reason)


def test_two_steps_with_a_beam_for_every_token_find_the_likeliest_pair(loaded: Loaded) -> None:
    """With as many beams as tokens nothing is cut off, so the best must be that of trying all pairs."""
    ids = loaded[1].encode(PROMPT)
    first = logprobs_after(loaded, ids)
    pairs: dict[tuple[int, int], float] = {}
    for a in np.argsort(-first)[:40].tolist():  # the others are too unlikely to begin the best pair
        second = logprobs_after(loaded, [*ids, a])
        pairs[a, int(second.argmax())] = first[a] + second.max()
    best = max(pairs, key=lambda pair: pairs[pair])
    options = GenerateOptions(max_tokens=2)
    (beam,) = arcee_mlx.beam_search(*loaded, PROMPT, options, num_beams=40, length_penalty=0.0)
    assert beam.tokens == best and beam.score == pytest.approx(pairs[best], abs=1e-4)


def test_scores_are_those_of_the_tokens_and_the_best_comes_first(loaded: Loaded) -> None:
    ids = loaded[1].encode(PROMPT)
    beams = arcee_mlx.beam_search(
        *loaded, PROMPT, GenerateOptions(max_tokens=10), num_beams=5, num_return_sequences=5, length_penalty=0.7
    )
    assert len({beam.tokens for beam in beams}) == 5
    assert [beam.score for beam in beams] == sorted((beam.score for beam in beams), reverse=True)
    for beam in beams:
        total = sum(logprobs_after(loaded, [*ids, *beam.tokens[:i]])[token] for i, token in enumerate(beam.tokens))
        assert beam.score == pytest.approx(total / len(beam.tokens) ** 0.7, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_bits": 8, "kv_group_size": 32},
        {"max_kv_size": 200},
        {"prefill_step_size": 2},
        {"logit_bias": {5: 40.0}, "frequency_penalty": 1.0},
    ],
)
def test_caches_and_penalties_work_with_beams(loaded: Loaded, options: dict[str, Any]) -> None:
    plain = arcee_mlx.beam_search(*loaded, PROMPT, GenerateOptions(max_tokens=8), num_beams=3)
    (beam,) = arcee_mlx.beam_search(*loaded, PROMPT, GenerateOptions(max_tokens=8, **options), num_beams=3)
    if "logit_bias" in options:
        assert beam.tokens != plain[0].tokens
    elif "kv_bits" not in options:
        assert beam.tokens == plain[0].tokens
    assert len(beam.tokens) <= 8


def test_an_extra_end_of_text_token_ends_beams(loaded: Loaded) -> None:
    options = GenerateOptions(max_tokens=12)
    (plain,) = arcee_mlx.beam_search(*loaded, PROMPT, options)
    vocabulary = {i: text for text, i in loaded[1]._backend.get_vocab().items()}
    end = vocabulary[plain.tokens[4]]
    beams = arcee_mlx.beam_search(
        *loaded,
        PROMPT,
        GenerateOptions(max_tokens=12, extra_eos_tokens=(end,), prefill_step_size=3),
        num_return_sequences=4,
    )
    ended = [beam for beam in beams if beam.stop_reason == "eos"]
    assert ended
    for beam in ended:
        assert beam.tokens[-1] in {plain.tokens[4], *loaded[1].eos_token_ids}
        assert beam.text == loaded[1].decode(beam.tokens[:-1], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; expected"),
        ({"num_beams": True}, "num_beams is True; expected"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences is 3; expected at most num_beams, 2"),
        ({"length_penalty": float("nan")}, "length_penalty is nan; expected"),
        ({"early_stopping": "maybe"}, "early_stopping is 'maybe'; expected"),
        ({"options": GenerateOptions(temp=0.5)}, "temp is 0.5 in a beam search"),
        ({"options": GenerateOptions(top_k=5)}, "top_k is 5 in a beam search"),
        ({"options": GenerateOptions(seed=0)}, "seed is 0 in a beam search"),
        ({"options": GenerateOptions(stop=("x",))}, "stop is .* in a beam search"),
        ({"options": GenerateOptions(logprobs=True)}, "logprobs is True in a beam search"),
        ({"options": GenerateOptions(num_draft_tokens=2)}, "num_draft_tokens is 2 in a beam search"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(loaded: Loaded, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        arcee_mlx.beam_search(*loaded, PROMPT, **arguments)
