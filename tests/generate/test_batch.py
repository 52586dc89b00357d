"""generate_batch and generate_answers: the answers of one by one, whoever else is in the batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import Answer, CallbackError, GenerateOptions, InputError
from arcee_mlx.generate.answer import join_chunks
from arcee_mlx.generate.request import encode_prompt
from arcee_mlx.upstream import mlx_lm_module

from conftest import write_checkpoint

Loaded = tuple[arcee_mlx.ArceeForCausalLM, arcee_mlx.Tokenizer]
PROMPTS: list[Any] = [
    "Call me Ishmael.",
    "Some years ago, never mind how long precisely, having little or no money",
    "a",
    [7],
    "I would sail about a little and see the watery part of the world. " * 3,
    [{"role": "user", "content": "日本語 🙂"}],
    "Grüße",
    "naïve café",
]
SAMPLED = GenerateOptions(
    max_tokens=16, temp=1.0, top_k=50, repetition_penalty=1.2, frequency_penalty=0.3, xtc_probability=0.3, seed=11
)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def alone(loaded: Loaded, prompt: Any, options: GenerateOptions) -> Answer:
    return join_chunks(list(arcee_mlx.stream_generate(*loaded, prompt, options)))


def batch_noise(model: arcee_mlx.ArceeForCausalLM, rows: list[list[int]]) -> tuple[float, list[np.ndarray]]:
    """Largest difference between logits in a batch and alone over the same tokens; and the logits alone, a row each."""
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    cache = [mlx_lm_module("models.cache").BatchKVCache(padding) for _ in model.layers]
    together = np.array(model(mx.array([[0] * p + row for p, row in zip(padding, rows, strict=True)]), cache))
    singles = [np.array(model(mx.array([row]), model.make_cache()))[0] for row in rows]
    return max(float(np.abs(t[p:] - s).max()) for t, p, s in zip(together, padding, singles, strict=True)), singles


def test_greedy_answers_are_those_of_one_by_one_unless_the_two_best_are_closer_than_the_noise(loaded: Loaded) -> None:
    model, tokenizer = loaded
    options = GenerateOptions(max_tokens=40, temp=0)
    answers = arcee_mlx.generate_batch(model, tokenizer, PROMPTS, options)
    expected = [alone(loaded, prompt, options) for prompt in PROMPTS]
    prompts = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    noise, logits = batch_noise(model, [p + list(e.tokens) for p, e in zip(prompts, expected, strict=True)])
    apart = 0
    for prompt, answer, single, row in zip(prompts, answers, expected, logits, strict=True):
        if answer.tokens != single.tokens:
            apart += 1
            place = next(
                i for i, pair in enumerate(zip(answer.tokens, single.tokens, strict=False)) if len({*pair}) > 1
            )
            second, best = np.sort(row[len(prompt) - 1 + place])[-2:]
            assert best - second <= 2 * noise
    spread = float(np.std(logits[0]))
    print(f"\nnoise {noise:.2g} of logits with deviation {spread:.2g}; {apart} of {len(answers)} answers differ")
    assert noise < 1e-4 * spread


@pytest.mark.parametrize("max_batch_size", [1, 3, 32])
def test_sampled_answers_are_those_of_one_by_one_with_the_same_seed(loaded: Loaded, max_batch_size: int) -> None:
    answers = arcee_mlx.generate_batch(*loaded, PROMPTS, SAMPLED, max_batch_size=max_batch_size)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        single = alone(loaded, prompt, SAMPLED)
        assert (answer.tokens, answer.text, answer.stop_reason) == (single.tokens, single.text, single.stop_reason)
        assert answer.stats.prompt_tokens == single.stats.prompt_tokens
        assert answer.stats.generation_tokens == len(answer.tokens) and answer.stats.seed == 11


def test_every_prompt_may_have_options_of_its_own(loaded: Loaded) -> None:
    whole = alone(loaded, PROMPTS[1], GenerateOptions(max_tokens=30, temp=0))
    stop = whole.text[len(whole.text) // 2 :][:3]
    each = [
        GenerateOptions(max_tokens=5, temp=0),
        GenerateOptions(max_tokens=30, temp=0, stop=(stop,)),
        GenerateOptions(max_tokens=9, temp=1.2, seed=5),
        GenerateOptions(max_tokens=9, temp=0, logprobs=True, top_logprobs=3),
        GenerateOptions(max_tokens=7, temp=0, logit_bias={77: 1e9}, prefill_step_size=3),
        GenerateOptions(max_tokens=7, temp=0, prefill_response="Call"),
    ]
    order = [*PROMPTS[:5], PROMPTS[5]]
    answers = arcee_mlx.generate_batch(*loaded, order, each)
    for prompt, options, answer in zip(order, each, answers, strict=True):
        single = alone(loaded, prompt, options)
        assert (answer.tokens, answer.text, answer.stop_reason) == (single.tokens, single.text, single.stop_reason)
        assert answer.logprobs == pytest.approx(single.logprobs, abs=1e-4)
        assert len(answer.top_logprobs) == len(answer.logprobs)
    assert [answer.stop_reason for answer in answers[:2]] == ["max_tokens", "stop_string"]
    assert set(answers[4].tokens) == {77}


def test_rows_end_at_their_own_end_of_text(loaded: Loaded) -> None:
    options = GenerateOptions(max_tokens=60, temp=1.5, seed=2, logit_bias={1: 6.0})
    answers = arcee_mlx.generate_batch(*loaded, PROMPTS, options)
    assert len({len(answer.tokens) for answer in answers}) > 2  # they end at different times
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert answer.tokens == alone(loaded, prompt, options).tokens
        assert (answer.stop_reason == "eos") == (answer.tokens[-1] in loaded[1].eos_token_ids)


def test_the_context_ends_a_row(loaded: Loaded) -> None:
    long = [5] * 250
    options = GenerateOptions(max_tokens=-1, temp=0)
    answers = arcee_mlx.generate_batch(*loaded, [long, [5] * 240], options)
    assert [answer.stop_reason for answer in answers] == ["context_full"] * 2
    assert [len(answer.tokens) for answer in answers] == [6, 16]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_of_length_dependent_rope_do_not_influence_each_other(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 8.0}
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 4.0}
        rope["original_max_position_embeddings"] = 24
    write_checkpoint(tmp_path / "m", rope_parameters=rope, max_position_embeddings=256 if kind == "longrope" else 24)
    loaded = arcee_mlx.load(tmp_path / "m")
    options = GenerateOptions(max_tokens=20, temp=0)
    answers = arcee_mlx.generate_batch(*loaded, PROMPTS, options)
    assert [answer.tokens for answer in answers] == [alone(loaded, prompt, options).tokens for prompt in PROMPTS]


def test_an_empty_list_has_no_answers(loaded: Loaded) -> None:
    assert arcee_mlx.generate_batch(*loaded, []) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a", ""], None, "prompt 1: the prompt is empty"),
        (["a", [400]], None, "prompt 1: prompt holds the id 400"),
        (["a", "b"], [GenerateOptions()], "options has 1 entries; expected one for all or 2"),
        (["a"], GenerateOptions(kv_bits=8, kv_group_size=32), "prompt 0: kv_bits is 8 in a batch"),
        (["a"], GenerateOptions(max_kv_size=32), "prompt 0: max_kv_size is 32 in a batch"),
        (["a"], GenerateOptions(num_draft_tokens=3), "prompt 0: num_draft_tokens is 3 in a batch"),
        ("text", None, "prompts is a single prompt"),
        ([1, 2], None, "prompts is a single prompt"),
    ],
)
def test_a_mistake_is_named_before_anything_is_computed(
    loaded: Loaded, prompts: Any, options: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        arcee_mlx.generate_batch(*loaded, prompts, options)


def test_a_processor_of_the_callers_sees_each_row_and_answers_for_itself(loaded: Loaded) -> None:
    def forbid_what_was(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, tokens].add(-1e9)

    def fail(tokens: mx.array, logits: mx.array) -> mx.array:
        raise RuntimeError("mine")

    options = GenerateOptions(max_tokens=12, temp=0)
    answers = arcee_mlx.generate_batch(*loaded, PROMPTS[:3], options, logits_processors=[forbid_what_was])
    for prompt, answer in zip(PROMPTS[:3], answers, strict=True):
        tokens = [*loaded[1].encode(prompt), *answer.tokens]
        assert len(set(answer.tokens)) == len(answer.tokens) and len(set(tokens)) >= len(answer.tokens) + 1
    with pytest.raises(CallbackError, match="fail raised RuntimeError: mine"):
        arcee_mlx.generate_batch(*loaded, PROMPTS[:3], options, logits_processors=[fail])
    assert (
        arcee_mlx.generate_batch(*loaded, PROMPTS[:1], options)[0].tokens == alone(loaded, PROMPTS[0], options).tokens
    )


def test_the_wired_limit_is_as_before_while_a_batch_runs(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [7]

    def set_wired_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    generation = mlx_lm_module("generate")
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    seen: list[int] = []
    step = generation.BatchGenerator.next_generated
    monkeypatch.setattr(
        generation.BatchGenerator, "next_generated", lambda self: (seen.append(limits[-1]), step(self))[1]
    )
    arcee_mlx.generate_batch(*loaded, PROMPTS[:2], GenerateOptions(max_tokens=3, temp=0))
    assert limits == [7, 1000, 7]
    assert set(seen) == {7}


def test_several_answers_to_one_prompt_are_those_of_counted_up_seeds(loaded: Loaded) -> None:
    answers = arcee_mlx.generate_answers(*loaded, PROMPTS[1], SAMPLED, n=5)
    expected = [alone(loaded, PROMPTS[1], replace(SAMPLED, seed=11 + i)) for i in range(5)]
    assert [(answer.text, answer.tokens) for answer in answers] == [(e.text, e.tokens) for e in expected]
    assert [answer.stats.seed for answer in answers] == [11, 12, 13, 14, 15]
    assert len({answer.text for answer in answers}) > 1
    assert len(arcee_mlx.generate_answers(*loaded, [5], SAMPLED, n=2)) == 2  # nothing to share before the last token


def test_several_answers_read_the_prompt_once(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    computed: list[tuple[int, int]] = []
    forward = type(model.model).__call__

    def count(self: Any, input_ids: mx.array, *rest: Any) -> mx.array:
        computed.append(input_ids.shape)
        return forward(self, input_ids, *rest)

    monkeypatch.setattr(type(model.model), "__call__", count)
    length = len(tokenizer.encode(PROMPTS[4]))
    arcee_mlx.generate_answers(model, tokenizer, PROMPTS[4], SAMPLED, n=4)
    assert computed[0] == (1, length - 1)
    assert {tokens for _, tokens in computed[1:]} == {1}


@pytest.mark.parametrize(
    ("options", "n", "message"),
    [
        (SAMPLED, 0, "n is 0; expected"),
        (SAMPLED, True, "n is True; expected"),
        (GenerateOptions(temp=0), 2, "n is 2 without a temperature"),
        (replace(SAMPLED, kv_bits=8, kv_group_size=32), 2, "kv_bits is 8 in a batch"),
        (replace(SAMPLED, num_draft_tokens=3), 2, "num_draft_tokens is 3 in a batch"),
    ],
)
def test_several_answers_are_refused_where_they_cannot_be(
    loaded: Loaded, options: GenerateOptions, n: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        arcee_mlx.generate_answers(*loaded, "a", options, n=n)
