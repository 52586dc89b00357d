"""Admission: bad values are refused in the caller's thread by type and field; queues and memory refuse, deadlines end."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcee_mlx import ArceeError, Engine, GenerateOptions, InputError, MemoryBudgetError, QueueFullError

from engine_script import GREEDY, PATIENCE_S, Gate, endless, run_on_owner, settle


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint) as engine:
        yield engine


INVALID: list[tuple[Any, dict[str, Any], str]] = [
    ("", {}, "the prompt is empty"),
    ([], {}, "the prompt is empty"),
    ([400], {}, "prompt holds the id 400 at place 0; expected 0 to 399"),
    ([5, -1], {}, "prompt holds the id -1 at place 1"),
    (np.array([2_000_000_000]), {}, "prompt holds the id 2000000000"),
    ([5.0], {}, "neither text, nor messages"),
    (b"a", {}, "prompt is of type bytes"),
    (None, {}, "prompt is of type NoneType"),
    ([5] * 256, {}, "the prompt has 256 tokens; expected fewer than the 256 positions"),
    ("a", {"logit_bias": {400: 1.0}}, "logit_bias names the id 400; expected ids from 0 to 399"),
    ("a", {"logit_bias": {2_000_000_000: 1.0}}, "logit_bias names the id 2000000000"),
    ("a", {"logit_bias": {-1: 1.0}}, "logit_bias names the id -1"),
    ("a", {"logit_bias": {5: float("nan")}}, "logit_bias is"),
    ("a", {"logit_bias": {5: float("inf")}}, "logit_bias is"),
    ("a", {"temp": float("nan")}, "temp is nan"),
    ("a", {"temp": -1}, "temp is -1"),
    ("a", {"temp": 1, "top_k": -1}, "top_k is -1"),
    ("a", {"temp": 1, "top_p": 1.5}, "top_p is 1.5"),
    ("a", {"temp": 1, "xtc_probability": 0.5, "xtc_threshold": 0.9}, "xtc_threshold is 0.9"),
    ("a", {"temp": 0, "top_k": 5}, "top_k without a temperature"),
    ("a", {"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ("a", {"max_tokens": 0}, "max_tokens is 0"),
    ("a", {"seed": 2**64}, "seed is"),
    ("a", {"stop": ("",)}, "stop is"),
    ("a", {"top_logprobs": 3}, "top_logprobs is 3"),
    ("a", {"logprobs": True, "top_logprobs": 401}, "top_logprobs is 401"),
    ("a", {"kv_bits": 3}, "kv_bits is 3"),
    ("a", {"kv_bits": 8, "kv_group_size": 64}, "kv_group_size is 64; expected a divisor"),
    ("a", {"kv_bits": 8, "max_kv_size": 64}, "kv_bits together with max_kv_size"),
    ("a", {"extra_eos_tokens": ("no such token",)}, "extra_eos_tokens names"),
    ("a", {"prefill_response": "x"}, "prefill_response with a prompt that is not messages"),
]


@pytest.mark.parametrize(("prompt", "options", "message"), INVALID, ids=[case[2][:40] for case in INVALID])
def test_every_door_refuses_a_bad_value_before_anything_is_computed(
    engine: Engine, prompt: Any, options: dict[str, Any], message: str
) -> None:
    before = engine.stats()

    async def first() -> None:
        await anext(engine.astream(prompt, GenerateOptions(**options)))

    for door in (
        lambda: engine.submit(prompt, GenerateOptions(**options)),
        lambda: engine.generate(prompt, GenerateOptions(**options)),
        lambda: engine.stream(prompt, GenerateOptions(**options)),
        lambda: engine.generate_answers(prompt, GenerateOptions(**options), n=1),
        lambda: asyncio.run(first()),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            door()
    settle(engine)
    assert engine.stats() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"deadline_s": 0}, "deadline_s is 0"),
        ({"deadline_s": float("nan")}, "deadline_s is nan"),
        ({"deadline_s": True}, "deadline_s is True"),
        ({"deadline_s": "1"}, "deadline_s is '1'"),
        ({"options": {"max_tokens": 3}}, "options is of type dict; expected GenerateOptions"),
        ({"logits_processors": [3]}, "logits_processors[0] is of type int; expected a function"),
        ({"logits_processors": None}, "logits_processors is of type NoneType; expected a sequence of functions"),
        (
            {"logits_processors": lambda tokens, logits: logits},
            "logits_processors is of type function; expected a sequence of functions",
        ),
    ],
)
def test_what_is_no_option_is_checked_as_well(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    for door in (engine.submit, engine.generate, engine.stream):
        with pytest.raises(InputError, match=re.escape(message)):
            door("a", **arguments)


def test_n_and_buffers_are_numbers_that_can_be_served(engine: Engine) -> None:
    sampled = GenerateOptions(temp=1.0, max_tokens=3)
    for n in (0, True, 1.5, "2"):
        with pytest.raises(InputError, match="n is"):
            engine.generate_answers("a", sampled, n=n)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n is 2 without a temperature"):
        engine.generate_answers("a", GREEDY, n=2)
    with pytest.raises(InputError, match="n is 73; expected at most 72, max_batch_size and max_queue together"):
        engine.generate_answers("a", sampled, n=73)
    assert len(engine.generate_answers("a", sampled, n=72)) == 72
    for buffer in (0, None, 1.0, True):
        for door in (engine.stream, engine.astream):
            with pytest.raises(InputError, match="buffer_chunks is"):
                door("a", buffer_chunks=buffer)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
@pytest.mark.parametrize("name", ["max_batch_size", "max_queue", "prefill_step_size", "memory_budget_bytes"])
def test_an_engine_of_bad_numbers_is_not_loaded(checkpoint: Path, name: str, value: Any) -> None:
    if (name, value) == ("max_queue", 0):
        pytest.skip("no queue is a queue")
    with pytest.raises(InputError, match=f"{name} is {value!r}"):
        Engine.load(checkpoint, **{name: value})


def test_a_checkpoint_that_is_not_there_is_said_by_type(tmp_path: Path) -> None:
    with pytest.raises(ArceeError):
        Engine.load(tmp_path / "nothing")


@pytest.mark.parametrize(("max_batch_size", "max_queue"), [(1, 0), (1, 2), (3, 1)])
def test_a_full_queue_refuses_and_takes_again_when_one_has_ended(
    checkpoint: Path, max_batch_size: int, max_queue: int
) -> None:
    with Engine.load(checkpoint, max_batch_size=max_batch_size, max_queue=max_queue) as engine:
        gate = Gate()
        requests = [engine.submit("a", endless(3), logits_processors=[gate])]
        gate.wait()
        requests += [engine.submit("a", endless(3)) for _ in range(max_batch_size + max_queue - 1)]
        for door in (engine.submit, engine.generate, engine.stream):
            with pytest.raises(
                QueueFullError, match=f"{len(requests)} requests are open; expected at most {len(requests)}"
            ):
                door("a", endless(3))
        with pytest.raises(InputError):  # a bad request is bad first
            engine.submit("")
        gate.open()
        for request in requests:
            assert len(request.result(PATIENCE_S).tokens) == 3
        for _ in range(3 * len(requests)):  # ended requests that are still held count no more
            requests.append(engine.submit("a", endless(3)))
            requests[-1].result(PATIENCE_S)


# Memory.


def test_a_request_that_can_never_fit_is_refused_at_once_and_its_advice_holds(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        weights = engine._owner.budget.weights_bytes
    with Engine.load(checkpoint, memory_budget_bytes=weights + 1_300_000) as engine:
        for door in (engine.submit, engine.generate, engine.stream):
            with pytest.raises(MemoryBudgetError, match="lower max_tokens to") as caught:
                door([5] * 40, endless(200))
        found = re.search(r"lower max_tokens to (\d+), .*raise memory_budget_bytes to (\d+)", str(caught.value))
        assert found
        most, needed = map(int, found.groups())
        assert len(engine.generate([5] * 40, endless(most)).tokens) == most
        with pytest.raises(MemoryBudgetError):
            engine.submit([5] * 40, endless(most + 1))
    with Engine.load(checkpoint, memory_budget_bytes=needed) as engine:
        assert len(engine.generate([5] * 40, endless(200)).tokens) == 200


def test_weights_that_do_not_fit_are_not_served(checkpoint: Path) -> None:
    with pytest.raises(MemoryBudgetError, match="the weights take .* MB; expected less than the budget of 0.100 MB"):
        Engine.load(checkpoint, memory_budget_bytes=100_000)


def test_a_request_waits_for_memory_or_fails_at_once_as_asked(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        budget = engine._owner.budget
        size = run_on_owner(engine, lambda: budget.measure(engine._check("a", endless(100), None)))
        tight = budget.predict([size]) + size.kv_bytes // 2
    with Engine.load(checkpoint, memory_budget_bytes=tight, prefix_cache_bytes=0) as engine:
        gate = Gate()
        first = engine.submit("a", endless(100), logits_processors=[gate])
        gate.wait()
        second = engine.submit("a", endless(100))
        refused = engine.submit("a", endless(100), wait=False)
        gate.open()
        with pytest.raises(
            MemoryBudgetError, match=r"the request and the \d before it need .* let it wait, lower max_tokens"
        ):
            refused.result(PATIENCE_S)
        assert first.result(PATIENCE_S).tokens == second.result(PATIENCE_S).tokens
        settle(engine)
        assert (engine.stats().done, engine.stats().failed) == (2, 1)
        assert len(engine.generate("a", endless(100), wait=False).tokens) == 100  # nobody is before it now


# Deadlines, on a clock that the test turns.


def test_a_deadline_ends_what_waits_and_what_is_read_and_what_is_generated(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from arcee_mlx.engine import request as request_module

    class Time:
        now_s = 1000.0
        perf_counter = staticmethod(request_module.time.perf_counter)

        @classmethod
        def monotonic(cls) -> float:
            return cls.now_s

    monkeypatch.setattr(request_module, "time", Time)
    with Engine.load(checkpoint, max_batch_size=2, prefill_step_size=10) as engine:
        gate = Gate(tokens=3)
        generating = engine.submit("a", endless(50), logits_processors=[gate], deadline_s=5)
        gate.wait()
        reading = engine.submit([5] * 200, endless(50), deadline_s=5)
        waiting = engine.submit("b", endless(50), deadline_s=5)
        lasting = engine.submit("c", endless(5), deadline_s=50)
        Time.now_s += 6
        gate.open()
        answers = [request.result(PATIENCE_S) for request in (generating, reading, waiting)]
        assert [answer.stop_reason for answer in answers] == ["deadline"] * 3
        assert len(answers[0].tokens) in (2, 3) and answers[1].tokens == answers[2].tokens == ()
        assert answers[0].tokens == engine.generate("a", endless(len(answers[0].tokens))).tokens
        assert lasting.result(PATIENCE_S).stop_reason == "max_tokens"


def test_a_deadline_wakes_the_engine_for_a_paused_answer(engine: Engine) -> None:
    stream = engine.stream("a", endless(50), buffer_chunks=2, deadline_s=0.05)
    assert stream.request.result(PATIENCE_S).stop_reason == "deadline"
    chunks = list(stream)
    assert "".join(chunk.text for chunk in chunks) == stream.request.result().text
