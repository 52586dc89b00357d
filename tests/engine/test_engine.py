"""Engine: the answers of generate, alone, cold and cached, from any thread; what it refuses; and how it closes."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import (
    DEMO_MODEL,
    ArceeError,
    Engine,
    GenerateOptions,
    InputError,
    MemoryBudgetError,
    QueueFullError,
    TokenizerError,
)
from arcee_mlx.generate.answer import join_chunks

from engine_script import GREEDY, LONG, Gate, Loaded, alone, said

SAMPLED = GenerateOptions(max_tokens=8, temp=1.0, top_k=40, seed=11)
OPTIONS = {
    "greedy": GREEDY,
    "checkpoint's own": GenerateOptions(max_tokens=8, seed=3),
    "sampled": replace(SAMPLED, top_p=0.95, min_p=0.01),
    "penalties": replace(SAMPLED, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
    "bias": replace(SAMPLED, logit_bias={300: 6.0, 264: -100.0}),
    "xtc": replace(SAMPLED, xtc_probability=0.5),
    "end of text": replace(SAMPLED, logit_bias={3: 7.0}, max_tokens=40),
    "logprobs": replace(SAMPLED, logprobs=True, top_logprobs=3, repetition_penalty=1.2),
    "quantized": replace(SAMPLED, kv_bits=8, repetition_penalty=1.2),
    "rotating": replace(SAMPLED, max_kv_size=12, max_tokens=14, repetition_penalty=1.2),
    "small chunks": replace(GREEDY, prefill_step_size=3),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(DEMO_MODEL) as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return arcee_mlx.load(DEMO_MODEL)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_answer_is_that_of_generate_cold_and_cached(engine: Engine, loaded: Loaded, name: str) -> None:
    options = OPTIONS[name]
    ids = loaded[1].encode("Call me Ishmael. Some years ago, never mind how long", add_special_tokens=False)
    prompt = [1000 + list(OPTIONS).index(name), *ids]  # a beginning of its own
    expected = alone(loaded, prompt, options)
    is_cached = options.max_kv_size is None
    for kind in ("cold", "exact repeat"):
        answer = engine.generate(prompt, options)
        assert said(answer) == said(expected)
        assert answer.stats.cached_tokens == (len(prompt) - 1 if kind == "exact repeat" and is_cached else 0)
        assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        for one, other in zip(answer.top_logprobs, expected.top_logprobs, strict=True):
            assert [top.token for top in one] == [top.token for top in other]
            assert [top.logprob for top in one] == pytest.approx([top.logprob for top in other], abs=1e-4)
    longer = prompt[:9] + ids
    answer = engine.generate(longer, options)
    assert said(answer) == said(alone(loaded, longer, options))
    assert answer.stats.cached_tokens == (9 if is_cached else 0)
    assert answer.stats.prompt_tokens == len(longer) and answer.stats.generation_tokens == len(answer.tokens)


@pytest.mark.parametrize("name", ["sampled", "rotating"])
def test_every_way_to_ask_gives_the_same_answer(engine: Engine, loaded: Loaded, name: str) -> None:
    options, prompt = OPTIONS[name], [{"role": "user", "content": f"Where is the {name} sea?"}]
    options = replace(options, prefill_response="It is")
    expected = said(alone(loaded, prompt, options))

    async def read() -> list[arcee_mlx.GenerationChunk]:
        return [chunk async for chunk in engine.astream(prompt, options)]

    request = engine.submit(prompt, options)
    assert said(request.result()) == expected and request.state == "done"
    assert said(request.result()) == expected  # as often as one likes
    assert said(engine.generate(prompt, options)) == expected
    assert said(join_chunks(list(engine.stream(prompt, options)))) == expected
    assert said(join_chunks(asyncio.run(read()))) == expected
    assert said(engine.generate_answers(prompt, options, n=1)[0]) == expected
    stream = engine.stream(prompt, options)
    assert said(stream.request.result()) == expected == said(join_chunks(list(stream)))  # in whatever order


def test_stop_strings_end_the_answer_and_are_no_part_of_it(engine: Engine, loaded: Loaded) -> None:
    whole = alone(loaded, "The sea is", replace(GREEDY, max_tokens=30))
    stop = whole.text[20:25]
    options = replace(GREEDY, max_tokens=30, stop=("never said", stop))
    answer = engine.generate("The sea is", options)
    assert answer.stop_reason == "stop_string" and answer.text == whole.text[: whole.text.index(stop)]
    assert said(answer) == said(alone(loaded, "The sea is", options))
    text = "".join(chunk.text for chunk in engine.stream("The sea is", options))
    assert text == answer.text


def test_a_long_prompt_in_the_engines_chunks_is_as_in_one(checkpoint: Path) -> None:
    loaded = arcee_mlx.load(checkpoint)
    prompt = [5 + i % 300 for i in range(200)]
    with Engine.load(checkpoint, prefill_step_size=48) as engine:
        for options in (GREEDY, replace(GREEDY, max_kv_size=64), replace(GREEDY, kv_bits=8, kv_group_size=32)):
            expected = alone(loaded, prompt, replace(options, prefill_step_size=48))
            assert said(engine.generate(prompt, options)) == said(expected)


def test_several_answers_are_those_of_the_seeds_that_follow(engine: Engine, loaded: Loaded) -> None:
    prompt = [901, 902, 903, 904]
    before = engine.stats()
    answers = engine.generate_answers(prompt, SAMPLED, n=5)
    for i, answer in enumerate(answers):
        assert said(answer) == said(alone(loaded, prompt, replace(SAMPLED, seed=11 + i)))
    assert len({answer.text for answer in answers}) > 1
    after = engine.stats()
    assert after.computed_prompt_tokens - before.computed_prompt_tokens == len(prompt) + 4  # once, and the last of each


def test_many_threads_get_each_its_own_answers(engine: Engine, loaded: Loaded) -> None:
    work = [([700 + i, 801, 802 + i], replace(list(OPTIONS.values())[i], seed=i)) for i in range(9)]
    expected = [said(alone(loaded, *each)) for each in work]
    with ThreadPoolExecutor(9) as pool:
        ready = threading.Barrier(9)

        def ask(i: int) -> Any:
            ready.wait()
            if i % 2:
                return said(engine.generate(*work[i]))
            return said(join_chunks(list(engine.stream(*work[i]))))

        assert list(pool.map(ask, range(9))) == expected


def test_results_cannot_be_changed(engine: Engine) -> None:
    chunk = next(engine.stream("a", replace(GREEDY, logprobs=True, top_logprobs=1)))
    answer = engine.generate("a", replace(GREEDY, max_tokens=1))
    for value in (answer, answer.stats, chunk, chunk.stats, chunk.top_logprobs[0], engine.stats()):
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, None)
    assert type(answer.tokens) is tuple and type(chunk.top_logprobs) is tuple


def identity(_: mx.array, logits: mx.array) -> mx.array:
    return logits


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"prompt": ""}, InputError, "prompt is empty"),
        ({"prompt": []}, InputError, "prompt is empty"),
        ({"prompt": [4096]}, InputError, "prompt holds the id 4096 at place 0; expected 0 to 4095"),
        ({"prompt": [1, -1]}, InputError, "prompt holds the id -1 at place 1"),
        ({"prompt": [1.5]}, InputError, "prompt holds neither"),
        ({"prompt": None}, InputError, "prompt is of type NoneType"),
        ({"prompt": b"bytes"}, InputError, "prompt is of type bytes"),
        ({"prompt": [5] * 2048}, InputError, "prompt has 2048 tokens; expected fewer than the 2048"),
        ({"prompt": [{"role": "user"}]}, TokenizerError, "content"),
        ({"options": GenerateOptions(logit_bias={4096: 1.0})}, InputError, "logit_bias names the id 4096"),
        ({"options": GenerateOptions(logit_bias={-1: 1.0})}, InputError, "logit_bias names the id -1"),
        ({"options": GenerateOptions(logit_bias={2_000_000_000: 1.0})}, InputError, "logit_bias names the id"),
        ({"options": GenerateOptions(logprobs=True, top_logprobs=4097)}, InputError, "top_logprobs is 4097"),
        ({"options": GenerateOptions(kv_bits=8, kv_group_size=128)}, InputError, "kv_group_size is 128"),
        ({"options": GenerateOptions(temp=0, top_k=5)}, InputError, "top_k without a temperature"),
        ({"options": GenerateOptions(temp=0, xtc_probability=0.5)}, InputError, "xtc_probability without a temp"),
        ({"options": GenerateOptions(extra_eos_tokens=("no token",))}, InputError, "extra_eos_tokens names 'no token'"),
        ({"options": GenerateOptions(prefill_response="x")}, InputError, "prefill_response with a prompt"),
        ({"options": GenerateOptions(num_draft_tokens=2)}, InputError, "num_draft_tokens is 2 in an engine"),
        ({"options": {"temp": 0}}, InputError, "options is of type dict; expected GenerateOptions"),
        ({"deadline_s": 0}, InputError, "deadline_s is 0"),
        ({"deadline_s": float("nan")}, InputError, "deadline_s is nan"),
        ({"deadline_s": True}, InputError, "deadline_s is True"),
        ({"deadline_s": "1"}, InputError, "deadline_s is '1'"),
        ({"logits_processors": identity}, InputError, "logits_processors is of type function; expected a sequence"),
        ({"logits_processors": [identity, "x"]}, InputError, r"logits_processors\[1\] is of type str"),
        ({"wait": None}, InputError, "wait is None"),
    ],
)
def test_a_bad_value_is_refused_in_the_callers_thread(
    engine: Engine, given: dict[str, Any], error: type[ArceeError], message: str
) -> None:
    before = engine.stats()
    given = {"prompt": "a", "options": GREEDY} | given

    async def ask() -> None:
        async for _ in engine.astream(**given):
            pass

    several: Callable[..., object] = lambda **given: engine.generate_answers(**given, n=1)  # noqa: E731
    for call in (engine.submit, engine.generate, engine.stream, several, lambda **_: asyncio.run(ask())):
        with pytest.raises(error, match=message):
            call(**given)
    assert engine.stats() == before  # it never came so far as to fail


@pytest.mark.parametrize("bad", [0, -1, 1.0, True, None])
def test_a_bad_count_is_refused(engine: Engine, bad: Any) -> None:
    for call in (engine.stream, engine.astream):
        with pytest.raises(InputError, match=f"buffer_chunks is {bad}; expected an integer of at least 1"):
            call("a", buffer_chunks=bad)
    with pytest.raises(InputError, match=f"n is {bad}; expected an integer of at least 1"):
        engine.generate_answers("a", n=bad)


def test_several_answers_are_refused_where_they_cannot_be(engine: Engine) -> None:
    with pytest.raises(InputError, match="n is 2 without a temperature"):
        engine.generate_answers("a", GREEDY, n=2)
    with pytest.raises(InputError, match="n is 73; expected at most 72"):
        engine.generate_answers("a", SAMPLED, n=73)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_queue": -1}, "max_queue is -1"),
        ({"prefill_step_size": True}, "prefill_step_size is True"),
        ({"prefix_cache_bytes": 1.5}, "prefix_cache_bytes is 1.5"),
        ({"wired_limit_bytes": -1}, "wired_limit_bytes is -1"),
        ({"memory_budget_bytes": 0}, "memory_budget_bytes is 0"),
        ({"max_batch_size": None}, "max_batch_size is None"),
    ],
)
def test_an_engine_is_not_loaded_with_a_bad_number(checkpoint: Path, given: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(InputError, match=message):
        Engine.load(checkpoint, **given)
    assert threading.active_count() == before


def test_what_load_raises_ends_the_thread(tmp_path: Path, checkpoint: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ArceeError, match="nowhere"):
        Engine.load(tmp_path / "nowhere")
    with pytest.raises(MemoryBudgetError, match="the weights take .*; expected less than the budget"):
        Engine.load(checkpoint, memory_budget_bytes=1000)
    assert threading.active_count() == before


def test_the_wired_limit_is_left_alone_unless_asked_and_put_back(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [7]

    def set_wired_limit(limit: int) -> int:
        if limit > 10**12:
            raise ValueError("beyond the recommended working set")
        limits.append(limit)
        return limits[-2]

    monkeypatch.setattr(mx, "set_wired_limit", set_wired_limit)
    Engine.load(checkpoint).close()
    assert limits == [7]
    with Engine.load(checkpoint, wired_limit_bytes=10**9) as engine:
        engine.generate("a", GREEDY)
        assert limits == [7, 10**9]
    assert limits == [7, 10**9, 7]
    with pytest.raises(InputError, match="wired_limit_bytes is 2000000000000; expected what this system allows"):
        Engine.load(checkpoint, wired_limit_bytes=2 * 10**12)


def test_the_queue_is_bounded(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_batch_size=1, max_queue=2) as engine:
        gate = Gate()
        first = engine.submit("a", GREEDY, logits_processors=[gate])
        gate.wait()
        others = [engine.submit("b", GREEDY), engine.stream("c", GREEDY).request]
        for ask in (engine.submit, engine.generate, engine.stream):
            with pytest.raises(QueueFullError, match="3 requests are open; expected at most 3"):
                ask("d", GREEDY)
        with pytest.raises(QueueFullError):
            engine.generate_answers("d", SAMPLED, n=3)
        gate.open()
        assert all(request.result().stop_reason == "max_tokens" for request in [first, others[0]])
        assert len(engine.generate_answers("d", SAMPLED, n=3)) == 3  # all or none, and there is room again


def test_a_request_that_cannot_fit_is_refused_at_once_with_numbers_and_advice_that_holds(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        needed = engine.stats().predicted_bytes
    with Engine.load(checkpoint, memory_budget_bytes=needed + 1_350_000) as engine:
        with pytest.raises(MemoryBudgetError, match=r"needs [\d.]+ MB at its full length of 203 tokens") as refused:
            engine.submit([5, 6, 7], LONG)
        assert engine.stats().failed == 0
        found = re.search(r"lower max_tokens to (\d+)", str(refused.value))
        assert found is not None
        assert len(engine.generate([5, 6, 7], replace(LONG, max_tokens=int(found[1]))).tokens) == int(found[1])


def test_a_request_waits_for_memory_or_is_refused_as_asked(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        needed = engine._owner.budget.predict([engine._owner.budget.measure(check(engine))])
    with Engine.load(checkpoint, memory_budget_bytes=needed) as engine:
        gate = Gate()
        first = engine.submit([5, 6, 7], LONG, logits_processors=[gate])
        gate.wait()
        waits, refused = engine.submit([5, 6, 8], LONG), engine.submit([5, 6, 9], LONG, wait=False)
        gate.open()
        with pytest.raises(MemoryBudgetError, match=r"the 2 before it need [\d.]+ MB.*expected at most the budget"):
            refused.result()
        assert refused.state == "failed" and refused.has_ended
        assert len(first.result().tokens) == len(waits.result().tokens) == 200
        assert len(engine.generate([5, 6, 9], LONG, wait=False).tokens) == 200


def check(engine: Engine) -> Any:
    return engine._check([5, 6, 7], LONG, None)
