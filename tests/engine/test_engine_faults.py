"""Faults at every stage of the loop: what they concern fails by type, all else is answered as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import ArceeError, CallbackError, DeviceError, Engine, Request
from arcee_mlx.checkpoint.detokenizer import Detokenizer
from arcee_mlx.engine import scheduler
from arcee_mlx.engine.batch import Batch
from arcee_mlx.engine.prefix_cache import PrefixCache
from arcee_mlx.generate.row import Row

from engine_data import GREEDY, PATIENCE_S, PROMPTS, SAMPLED, Gate, Loaded, alone, endless, run_on_owner, settle

TOKENS = 12
OPTIONS = endless(TOKENS)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


@pytest.fixture(scope="module")
def expected(loaded: Loaded) -> list[arcee_mlx.Answer]:
    return [alone(loaded, prompt, OPTIONS) for prompt in PROMPTS]


@pytest.fixture
def engine(checkpoint: Path, loaded: Loaded, expected: list[arcee_mlx.Answer]) -> Iterator[Engine]:
    """One that must be as good as new afterwards."""
    with Engine.load(checkpoint) as engine:
        yield engine
        requests = [engine.submit(prompt, OPTIONS) for prompt in PROMPTS]
        assert [request.result(PATIENCE_S).tokens for request in requests] == [answer.tokens for answer in expected]
        assert engine.generate(PROMPTS[1], SAMPLED).tokens == alone(loaded, PROMPTS[1], SAMPLED).tokens
        settle(engine)
        stats = engine.stats()
        assert (stats.active, stats.queued) == (0, 0)
        assert not any(
            run_on_owner(engine, lambda: [len(engine._owner.scheduler._batch), engine._owner.scheduler._rows()])
        )


class Fault:
    """Stands in for a function and raises in one of its calls; counts from 1."""

    def __init__(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: BaseException | None = None
    ) -> None:
        self.calls, self.raised = 0, 0
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                self.raised += 1
                raise error or RuntimeError("[metal::malloc] planted")
            return function(*args, **kwargs)

        patch.setattr(owner, name, call)


def submit_all(engine: Engine, options: Any = OPTIONS) -> list[Request]:
    """All prompts in one turn, so that they decode together."""
    requests: list[Request] = run_on_owner(engine, lambda: [engine.submit(prompt, options) for prompt in PROMPTS])
    return requests


def outcomes(requests: list[Request], expected: list[arcee_mlx.Answer]) -> list[str]:
    """Of each: "whole", or the name of its error; what it gave until then must be the beginning of what was expected."""
    ends = []
    for request, answer in zip(requests, expected, strict=True):
        try:
            result = request.result(PATIENCE_S)
            assert (result.tokens, result.text) == (answer.tokens, answer.text)
            ends.append("whole")
        except ArceeError as error:
            ends.append(type(error).__name__)
        given = tuple(chunk.token for chunk in request._chunks)
        assert given == answer.tokens[: len(given)]  # none lost, none doubled
    return ends


ONE_FAILS: dict[str, tuple[Any, str, int]] = {
    "making a row": (scheduler, "ActiveRow", 3),
    "making a cache": (scheduler, "make_prompt_cache", 1),
    "forking a prefix": (PrefixCache, "fork", 3),
    "reading a prompt": (scheduler, "fill_cache", 2),
    "keeping a prompt's prefix": (PrefixCache, "insert", 1),
    "the first token": (Batch, "begin", 3),
    "taking a token": (Row, "add", 20),
    "writing a token": (Detokenizer, "add", 20),
}


@pytest.mark.parametrize("stage", ONE_FAILS)
@pytest.mark.parametrize(
    "error", [None, SystemExit("planted"), MemoryError("planted")], ids=["device", "exit", "memory"]
)
def test_what_fails_in_one_request_fails_it_alone(
    engine: Engine, expected: list[Any], monkeypatch: pytest.MonkeyPatch, stage: str, error: BaseException | None
) -> None:
    with monkeypatch.context() as patch:
        fault = Fault(patch, *ONE_FAILS[stage], error)
        ends = outcomes(submit_all(engine), expected)
    assert fault.raised == 1
    kind = "ArceeError" if isinstance(error, SystemExit) else "DeviceError"
    assert sorted(ends) == sorted([kind] + ["whole"] * 7)
    stats = engine.stats()
    assert (stats.done, stats.failed) == (7, 1)


ALL_FAIL: dict[str, tuple[Any, str, int]] = {
    "a step": (Batch, "step", 4),
    "joining": (Batch, "join", 5),
    "leaving": (Batch, "leave", 1),
}


@pytest.mark.parametrize("stage", ALL_FAIL)
def test_what_fails_in_the_batch_fails_those_in_it(
    engine: Engine, expected: list[Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patch:
        Fault(patch, *ALL_FAIL[stage])
        requests = submit_all(engine)
        alone_beside = engine.submit("a", endless(TOKENS, kv_bits=8, kv_group_size=32))
        ends = outcomes(requests, expected)
        assert len(alone_beside.result(PATIENCE_S).tokens) == TOKENS  # it is in no batch
    assert "DeviceError" in ends and set(ends) <= {"DeviceError", "whole"}
    if stage == "leaving":
        assert "whole" in ends  # the answer that was complete
    stats = engine.stats()
    assert stats.done + stats.failed == 9 and stats.failed == ends.count("DeviceError")


def test_an_error_of_the_device_names_what_it_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Fault(patch, Batch, "step", 1)
        with pytest.raises(
            DeviceError, match=r"computing failed: \[metal::malloc\] planted; the engine goes on"
        ) as caught:
            engine.generate("a", GREEDY)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "in step" in "".join(caught.value.__notes__) or "in call" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("kind", [{"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 24}])
def test_what_fails_in_a_row_of_its_own_fails_it_alone(
    engine: Engine, expected: list[Any], monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        Fault(patch, scheduler.Scheduler, "_step_alone", 5)
        lone = engine.submit("a", endless(TOKENS, **kind))
        ends = outcomes(submit_all(engine), expected)
        with pytest.raises(DeviceError):
            lone.result(PATIENCE_S)
    assert ends == ["whole"] * 8 and len(lone._chunks) == 4


@pytest.mark.parametrize("stage", ["extract", "leave", "begin", "join"])
def test_a_fault_while_an_answer_pauses_or_goes_on_fails_that_answer(
    engine: Engine, expected: list[Any], monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patch:
        if stage in ("extract", "leave"):
            Fault(patch, Batch, stage, 1)
        stream = engine.stream(PROMPTS[0], OPTIONS, buffer_chunks=2)
        if stage in ("begin", "join"):
            while not stream.request._chunks or run_on_owner(engine, lambda: engine._owner.scheduler.has_work):
                pass  # until it is paused
            Fault(patch, Batch, stage, 1)
        beside = engine.submit("a", endless(TOKENS, kv_bits=8, kv_group_size=32))
        if stage in ("extract", "leave"):  # nothing is read until it was to pause
            with pytest.raises(DeviceError):
                stream.request.result(PATIENCE_S)
        with pytest.raises(DeviceError):
            list(stream)
        assert len(beside.result(PATIENCE_S).tokens) == TOKENS
    given = tuple(chunk.token for chunk in stream.request._chunks)
    assert given == expected[0].tokens[: len(given)]


def test_a_prefix_that_cannot_be_kept_costs_no_answer(
    engine: Engine, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for place in range(1, 9):
            Fault(patch, Batch, "extract", place)
        assert outcomes(submit_all(engine), expected) == ["whole"] * 8


def test_two_faults_at_once_do_not_stop_the_loop(
    engine: Engine, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:  # rows that are cancelled when taking them out fails, which fails the batch
        Fault(patch, Batch, "leave", 1)
        gate = Gate(at=2)
        requests = run_on_owner(
            engine, lambda: [engine.submit(p, OPTIONS, logits_processors=[gate]) for p in PROMPTS[:3]]
        )
        gate.wait()
        for request in requests:
            request.cancel()
        gate.open()
        ends = [_end(request) for request in requests]
    assert ends.count("cancelled") >= 1 and set(ends) <= {"cancelled", "DeviceError"}


def _end(request: Request) -> str:
    try:
        return request.result(PATIENCE_S).stop_reason
    except ArceeError as error:
        return type(error).__name__


# What callers pass in.


def misbehave(at: int, how: Callable[[mx.array], Any]) -> Any:
    calls = 0

    def process(_tokens: mx.array, logits: mx.array) -> Any:
        nonlocal calls
        calls += 1
        return how(logits) if calls == at + 1 else logits

    return process


def _raise(error: BaseException) -> Callable[[mx.array], Any]:
    def how(_logits: mx.array) -> Any:
        raise error

    return how


MISBEHAVIOUR: dict[str, Callable[[mx.array], Any]] = {
    "raises": _raise(KeyError("mine")),
    "raises SystemExit": _raise(SystemExit(3)),
    "raises KeyboardInterrupt": _raise(KeyboardInterrupt()),
    "raises StopIteration": _raise(StopIteration()),
    "raises an error of ours": _raise(ArceeError("mine")),
    "returns nothing": lambda logits: None,
    "returns a number": lambda logits: 3,
    "returns too few": lambda logits: logits[:, :5],
    "returns no row": lambda logits: logits[0],
    "returns two rows": lambda logits: mx.concatenate([logits, logits]),
}


@pytest.mark.parametrize("how", MISBEHAVIOUR)
@pytest.mark.parametrize("at", [0, 5])
@pytest.mark.parametrize("kind", [{}, {"kv_bits": 8, "kv_group_size": 32}], ids=["batched", "alone"])
def test_a_processor_that_misbehaves_fails_its_request_alone(
    engine: Engine, expected: list[Any], how: str, at: int, kind: dict[str, Any]
) -> None:
    def submit() -> list[Request]:
        return [
            engine.submit(PROMPTS[1], endless(TOKENS, **kind), logits_processors=[misbehave(at, MISBEHAVIOUR[how])]),
            *(engine.submit(prompt, OPTIONS) for prompt in PROMPTS),
        ]

    bad, *good = run_on_owner(engine, submit)
    with pytest.raises(ArceeError if "ours" in how else CallbackError):
        bad.result(PATIENCE_S)
    assert len(bad._chunks) == at  # the tokens before it are given out
    assert outcomes(good, expected) == ["whole"] * 8


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.int32])
def test_a_processor_of_another_dtype_changes_its_own_row_only(
    engine: Engine, expected: list[Any], dtype: mx.Dtype
) -> None:
    def submit() -> list[Request]:
        return [
            engine.submit(PROMPTS[1], OPTIONS, logits_processors=[lambda _tokens, logits: logits.astype(dtype)]),
            *(engine.submit(prompt, OPTIONS) for prompt in PROMPTS),
        ]

    odd, *others = run_on_owner(engine, submit)
    assert len(odd.result(PATIENCE_S).tokens) == TOKENS
    assert outcomes(others, expected) == ["whole"] * 8


def test_a_step_that_runs_ahead_of_the_last_token_fails_nothing(engine: Engine, expected: list[Any]) -> None:
    for kind in ({}, {"kv_bits": 8, "kv_group_size": 32}):
        bad = misbehave(TOKENS, _raise(KeyError("one token more than there is")))
        assert len(engine.generate(PROMPTS[0], endless(TOKENS, **kind), logits_processors=[bad]).tokens) == TOKENS


def test_numbers_that_are_none_are_said_to_be(engine: Engine) -> None:
    with pytest.raises(ArceeError, match="the model computes NaN"):
        engine.generate("a", OPTIONS, logits_processors=[lambda _tokens, logits: logits * float("nan")])


def test_a_failed_request_keeps_nothing_of_the_engines_in_memory(checkpoint: Path) -> None:
    import gc

    with Engine.load(checkpoint, prefix_cache_bytes=0) as engine:
        engine.generate("a", OPTIONS)
        settle(engine)
        before = mx.get_active_memory()
        kept = []
        for i in range(5):
            with pytest.raises(CallbackError) as caught:
                engine.generate(PROMPTS[4], OPTIONS, logits_processors=[misbehave(i, _raise(KeyError("mine")))])
            kept.append(caught.value)
        settle(engine)
        gc.collect()
        assert mx.get_active_memory() - before < 64 * 1024
