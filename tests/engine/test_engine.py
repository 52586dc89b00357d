"""Engine: its answers are those of `generate`, by whatever door and from whatever thread they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

import arcee_mlx
from arcee_mlx import Engine, GenerateOptions
from arcee_mlx.generate.answer import join_chunks

from engine_data import (  # fmt: skip
    GREEDY,
    OPTIONS,
    PATIENCE_S,
    PROMPTS,
    SAMPLED,
    Gate,
    Loaded,
    alone,
    endless,
    is_promised,
    run_threads,
    settle,
)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint) as engine:
        yield engine
        stats = engine.stats()
        assert (stats.active, stats.queued) == (0, 0)


async def collect(engine: Engine, prompt: Any, options: GenerateOptions) -> list[arcee_mlx.GenerationChunk]:
    return [chunk async for chunk in engine.astream(prompt, options)]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_door_gives_the_answer_of_generate_cold_and_cached(engine: Engine, loaded: Loaded, name: str) -> None:
    options = OPTIONS[name]
    for prompt in (PROMPTS[1], PROMPTS[4], PROMPTS[5]):
        expected = alone(loaded, prompt, options)
        for answer in (
            engine.generate(prompt, options),  # the first is cold, all others are cached
            engine.submit(prompt, options).result(PATIENCE_S),
            join_chunks(list(engine.stream(prompt, options))),
            join_chunks(asyncio.run(collect(engine, prompt, options))),
        ):
            is_promised(loaded, prompt, options, answer, expected)
            assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-3)
            assert [[top.token for top in step] for step in answer.top_logprobs] == [
                [top.token for top in step] for step in expected.top_logprobs
            ]
            assert answer.stats.prompt_tokens == expected.stats.prompt_tokens
            assert answer.stats.generation_tokens == len(answer.tokens)
            assert options.seed is None or answer.stats.seed == options.seed


def test_requests_of_many_threads_have_options_of_their_own(engine: Engine, loaded: Loaded) -> None:
    names = list(OPTIONS) * 2
    work = [(PROMPTS[i % len(PROMPTS)], OPTIONS[name]) for i, name in enumerate(names)]
    answers = run_threads(len(work), lambda i: engine.generate(*work[i]))
    for (prompt, options), answer in zip(work, answers, strict=True):
        is_promised(loaded, prompt, options, answer, alone(loaded, prompt, options))


def test_a_seed_is_the_requests_own_whoever_is_beside_it(engine: Engine, loaded: Loaded) -> None:
    each = [replace(SAMPLED, seed=seed) for seed in (1, 2, 1, 3)]
    answers = [request.result(PATIENCE_S) for request in [engine.submit(PROMPTS[0], options) for options in each]]
    for options, answer in zip(each, answers, strict=True):
        is_promised(loaded, PROMPTS[0], options, answer, alone(loaded, PROMPTS[0], options))
    assert answers[0].tokens == answers[2].tokens != answers[1].tokens
    unseeded = [engine.generate(PROMPTS[0], replace(SAMPLED, seed=None)).stats.seed for _ in range(2)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("memory", [{}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 24}])
def test_n_answers_are_those_of_consecutive_seeds(engine: Engine, loaded: Loaded, memory: dict[str, int]) -> None:
    options = replace(SAMPLED, seed=2**64 - 2, **memory)
    answers = engine.generate_answers(PROMPTS[1], options, n=4)
    for seed, answer in zip((2**64 - 2, 2**64 - 1, 0, 1), answers, strict=True):
        own = replace(options, seed=seed)
        is_promised(loaded, PROMPTS[1], own, answer, alone(loaded, PROMPTS[1], own))
        assert answer.stats.seed == seed
    assert engine.generate_answers(PROMPTS[1], GREEDY, n=1)[0].tokens == alone(loaded, PROMPTS[1], GREEDY).tokens


def test_of_n_answers_the_prompt_is_computed_once(engine: Engine) -> None:
    prompt = [9, 8, 7] * 20
    before = engine.stats()
    engine.generate_answers(prompt, SAMPLED, n=5)
    after = engine.stats()
    assert after.prompt_tokens - before.prompt_tokens == 5 * 60
    assert after.computed_prompt_tokens - before.computed_prompt_tokens == 60 + 4  # one is left to each


def test_processors_see_what_they_see_in_generate(engine: Engine, loaded: Loaded) -> None:
    def watch(seen: list[list[int]]) -> Any:
        def process(tokens: Any, logits: Any) -> Any:
            seen.append(tokens.tolist())
            return logits

        return process

    for name in ("greedy", "kv_bits", "max_kv_size"):
        plain: list[list[int]] = []
        own: list[list[int]] = []
        again: list[list[int]] = []
        alone(loaded, PROMPTS[1], OPTIONS[name], [watch(plain)])
        count = len(engine.generate(PROMPTS[1], OPTIONS[name], logits_processors=[watch(own)]).tokens)
        engine.generate(PROMPTS[1], OPTIONS[name], logits_processors=[watch(again)])
        assert own[:count] == plain[:count] == again[:count]
        assert len(own) <= count + 1  # steps run ahead by one


def test_results_are_frozen(engine: Engine) -> None:
    answer = engine.generate("a", GREEDY)
    for result, name in ((answer, "text"), (answer.stats, "seed"), (engine.stats(), "done")):
        with pytest.raises(FrozenInstanceError):
            setattr(result, name, None)
    with pytest.raises(FrozenInstanceError):
        next(engine.stream("a", GREEDY)).text = ""  # type: ignore[misc]


def test_a_request_says_how_far_it_is_and_gives_its_result_again(engine: Engine) -> None:
    gate = Gate(at=2)
    first = engine.submit("a", endless(5), logits_processors=[gate])
    gate.wait()
    waiting = engine.submit("b", endless(5))
    assert (first.state, waiting.state) == ("generating", "queued")
    with pytest.raises(TimeoutError, match="the request is generating after 0.001 s"):
        first.result(0.001)
    gate.open()
    answer = first.result(PATIENCE_S)
    assert first.state == "done" and first.result() is answer
    assert waiting.result(PATIENCE_S).stop_reason == "max_tokens"
    first.cancel()  # too late to change anything
    assert first.result() is answer


def test_many_threads_may_wait_for_one_request(engine: Engine) -> None:
    gate = Gate()
    request = engine.submit("a", endless(5), logits_processors=[gate])
    gate.open()
    answers = run_threads(4, lambda _: request.result(PATIENCE_S))
    assert all(answer is answers[0] for answer in answers)


def test_requests_wait_their_turn_in_order(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_batch_size=1) as engine:
        order: list[int] = []

        def note(i: int) -> Any:
            def process(_tokens: Any, logits: Any) -> Any:
                if i not in order:
                    order.append(i)
                return logits

            return process

        gate = Gate()
        requests = [engine.submit("a", endless(3), logits_processors=[gate])]
        gate.wait()
        requests += [engine.submit("a", endless(3), logits_processors=[note(i)]) for i in range(5)]
        gate.open()
        for request in requests:
            request.result(PATIENCE_S)
        assert order == list(range(5))


def test_the_statistics_add_up(checkpoint: Path, loaded: Loaded) -> None:
    with Engine.load(checkpoint) as engine:
        lengths = [len(loaded[1].encode(prompt)) for prompt in PROMPTS[:3]]
        answers = [request.result(PATIENCE_S) for request in [engine.submit(p, GREEDY) for p in PROMPTS[:3]]]
        settle(engine)
        stats = engine.stats()
        assert (stats.done, stats.failed, stats.active, stats.queued) == (3, 0, 0, 0)
        assert stats.prompt_tokens == sum(lengths) >= stats.computed_prompt_tokens
        assert stats.generated_tokens == sum(len(answer.tokens) for answer in answers) > stats.decode_steps
        assert stats.prefix_cache_bytes > 0 and stats.predicted_bytes < stats.budget_bytes
        assert engine.config.vocab_size == 400 and engine.tokenizer.encode("a")
