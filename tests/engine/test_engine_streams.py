"""Streams: threads and event loops that read, read slowly, let go or are cancelled; at most one step is computed too many."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import CallbackError, Engine, GenerateOptions, InputError
from arcee_mlx.engine import scheduler
from arcee_mlx.engine.batch import Batch

from engine_data import GREEDY, PATIENCE_S, PROMPTS, SAMPLED, Gate, Loaded, alone, endless, run_on_owner, settle

KINDS: dict[str, dict[str, Any]] = {
    "batched": {},
    "quantized": {"kv_bits": 8, "kv_group_size": 32},
    "rotating": {"max_kv_size": 24},
}


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


@pytest.fixture
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, prefix_cache_bytes=0) as engine:
        yield engine
        settle(engine)
        stats = engine.stats()
        assert (stats.active, stats.queued) == (0, 0)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Of what was computed: steps of the batch and chunks of prompts."""
    counts = {"steps": 0, "chunks": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(Batch, "step", counted("steps", Batch.step))
    monkeypatch.setattr(scheduler, "fill_cache", counted("chunks", scheduler.fill_cache))
    return counts


def wait_until_idle(engine: Engine) -> None:
    """By asking the owner thread between two turns, so that nothing is timed."""
    while run_on_owner(engine, lambda: engine._owner.scheduler.has_work):
        pass


# Reading.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("buffer_chunks", [1, 2, 7])
def test_a_slow_reader_pauses_its_answer_and_gets_all_of_it(
    engine: Engine, loaded: Loaded, kind: str, buffer_chunks: int
) -> None:
    for options in (
        endless(30, **KINDS[kind]),
        GenerateOptions(max_tokens=30, temp=1.0, seed=5, logprobs=True, **KINDS[kind]),
    ):
        expected = alone(loaded, PROMPTS[1], options)
        stream = engine.stream(PROMPTS[1], options, buffer_chunks=buffer_chunks)
        fast = engine.submit(PROMPTS[0], endless(20))
        assert len(fast.result(PATIENCE_S).tokens) == 20  # it is not held up
        wait_until_idle(engine)
        made = len(stream.request._chunks)
        assert made == min(
            buffer_chunks + (kind == "batched"), len(expected.tokens)
        )  # the step ahead is given out, too
        chunks = list(stream)
        assert [chunk.token for chunk in chunks] == list(expected.tokens)
        assert "".join(chunk.text for chunk in chunks) == expected.text == stream.request.result().text
        assert [chunk.logprob for chunk in chunks if chunk.logprob is not None] == pytest.approx(
            expected.logprobs, abs=1e-4
        )


def test_answers_that_nobody_reads_keep_no_place_from_others(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_batch_size=2) as engine:
        unread = [engine.stream("a", endless(50), buffer_chunks=2) for _ in range(5)]
        for i in range(3):  # one after the other and all at once
            requests = [engine.submit("b", endless(10)) for _ in range(i + 1)]
            assert [len(request.result(PATIENCE_S).tokens) for request in requests] == [10] * (i + 1)
        assert engine.stats().active == 5
        texts = ["".join(chunk.text for chunk in stream) for stream in unread]
        assert texts == [engine.generate("a", endless(50)).text] * 5


def test_a_stream_that_failed_says_so_every_time(engine: Engine) -> None:
    def fail(_tokens: mx.array, _logits: mx.array) -> mx.array:
        raise KeyError("mine")

    stream = engine.stream("a", GREEDY, logits_processors=[fail])
    for _ in range(2):
        with pytest.raises(CallbackError, match="mine"):
            next(stream)
    depth = len(list(_frames(stream.request._error)))
    for _ in range(3):
        with contextlib.suppress(CallbackError):
            next(stream)
    assert len(list(_frames(stream.request._error))) == depth  # a kept error does not grow


def _frames(error: BaseException | None) -> Iterator[Any]:
    trace = error.__traceback__ if error else None
    while trace:
        yield trace
        trace = trace.tb_next


def test_a_stream_has_an_end(engine: Engine) -> None:
    with engine.stream("a", GREEDY) as stream:
        list(stream)
        assert next(stream, None) is None is next(stream, None)


# Event loops.


def test_the_event_loop_ticks_whenever_a_chunk_is_waited_for(engine: Engine) -> None:
    async def main() -> tuple[int, list[int]]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        seen = []
        async for _ in engine.astream(PROMPTS[4], endless(40), buffer_chunks=1):  # every chunk is waited for
            seen.append(ticks)
        ticking.cancel()
        return ticks, seen

    ticks, seen = asyncio.run(main())
    between = [b - a for a, b in zip([0, *seen], seen, strict=False)]
    assert len(seen) == 40 and ticks > 200
    assert sum(1 for each in between if each > 0) >= 18  # a pause gives out the step ahead, too: two chunks a wait


def test_the_loop_ticks_while_the_owner_thread_stands(engine: Engine) -> None:
    async def main() -> None:
        gate = Gate()
        task = asyncio.create_task(_first(engine.astream("a", GREEDY, logits_processors=[gate])))
        ticks = 0
        while not gate.entered.is_set() or ticks < 1000:
            ticks += 1
            await asyncio.sleep(0)
        assert not task.done()
        gate.open()
        assert (await task).token == alone_first

    alone_first = engine.generate("a", GREEDY).tokens[0]
    asyncio.run(main())


async def _first(stream: arcee_mlx.AsyncAnswerStream) -> arcee_mlx.GenerationChunk:
    return await anext(stream)


def test_loops_and_threads_read_side_by_side(engine: Engine, loaded: Loaded) -> None:
    expected = [alone(loaded, prompt, SAMPLED).text for prompt in PROMPTS]

    async def text(prompt: Any) -> str:
        return "".join([chunk.text async for chunk in engine.astream(prompt, SAMPLED, buffer_chunks=2)])

    async def main() -> list[str]:
        return list(
            await asyncio.gather(*map(text, PROMPTS), asyncio.to_thread(lambda: engine.generate("a", SAMPLED).text))
        )

    assert asyncio.run(main()) == [*expected, expected[2]]


def test_what_submit_raises_comes_with_the_first_chunk(engine: Engine) -> None:
    async def main() -> None:
        stream = engine.astream("", GREEDY)
        assert stream.request is None
        with pytest.raises(InputError, match="the prompt is empty"):
            await anext(stream)

    asyncio.run(main())


def test_one_stream_is_for_one_task(engine: Engine) -> None:
    async def main() -> None:
        stream = engine.astream("a", GREEDY)
        results = await asyncio.gather(anext(stream), anext(stream), return_exceptions=True)
        assert [type(result) for result in results] == [arcee_mlx.GenerationChunk, InputError]
        assert len([chunk async for chunk in stream]) == 15

    asyncio.run(main())


# Cancelling.


@pytest.mark.parametrize("kind", KINDS)
def test_after_cancel_no_step_begins(engine: Engine, count: dict[str, int], kind: str) -> None:
    called = 0

    def cancel_in_step_5(_tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal called
        called += 1
        if called == 5:
            requests[0].cancel()
        return logits

    gate = Gate()
    requests = [engine.submit("a", endless(100, **KINDS[kind]), logits_processors=[gate, cancel_in_step_5])]
    gate.open()
    answer = requests[0].result(PATIENCE_S)
    assert answer.stop_reason == "cancelled" and requests[0].state == "done"
    assert called == 5  # steps run ahead: the one in which it was cancelled is the last
    assert len(answer.tokens) in (4, 5)
    assert answer.tokens == engine.generate("a", endless(len(answer.tokens), **KINDS[kind])).tokens


def test_a_cancel_while_a_prompt_is_read_costs_no_further_chunk(
    engine: Engine, count: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = scheduler.fill_cache

    def fill_and_cancel(*args: Any) -> None:
        counted(*args)
        if count["chunks"] == cancel_at:
            request.cancel()

    monkeypatch.setattr(scheduler, "fill_cache", fill_and_cancel)
    for cancel_at in (3, 20):  # in the middle; and with the last chunk, after which no token is to be sampled
        count.update(steps=0, chunks=0)
        requests = run_on_owner(engine, lambda: [engine.submit([5] * 201, endless(20, prefill_step_size=10))])
        request = requests[0]
        answer = request.result(PATIENCE_S)
        assert (answer.stop_reason, answer.tokens, answer.text) == ("cancelled", (), "")
        settle(engine)
        assert count == {"steps": 0, "chunks": cancel_at}


def test_a_cancel_while_it_waits_costs_nothing(checkpoint: Path, count: dict[str, int]) -> None:
    with Engine.load(checkpoint, max_batch_size=1) as engine:
        gate = Gate()
        first = engine.submit("a", endless(5), logits_processors=[gate])
        gate.wait()
        waiting = engine.submit([5] * 50, endless(5))
        waiting.cancel()
        waiting.cancel()
        gate.open()
        assert waiting.result(PATIENCE_S).stop_reason == "cancelled"
        assert len(first.result(PATIENCE_S).tokens) == 5
        assert count["chunks"] <= 1


def test_a_cancelled_answer_leaves_the_others_as_they_are(engine: Engine, loaded: Loaded) -> None:
    def cancel_at(step: int, index: int) -> Any:
        calls = 0

        def process(_tokens: mx.array, logits: mx.array) -> mx.array:
            nonlocal calls
            calls += 1
            if calls == step:
                requests[index].cancel()
            return logits

        return process

    options = endless(24)
    requests: list[arcee_mlx.Request] = []

    def submit() -> None:
        requests.extend(
            engine.submit(prompt, options, logits_processors=[cancel_at(4 * i, i)] if i % 2 else [])
            for i, prompt in enumerate(PROMPTS)
        )

    run_on_owner(engine, submit)
    for i, (prompt, request) in enumerate(zip(PROMPTS, requests, strict=True)):
        answer, expected = request.result(PATIENCE_S), alone(loaded, prompt, options)
        assert answer.tokens == expected.tokens[: len(answer.tokens)]
        assert (answer.stop_reason, len(answer.tokens) == 24) == (
            ("cancelled", False) if i % 2 and 4 * i < 24 else ("max_tokens", True)
        )


LETTING_GO: dict[str, Callable[[Engine, Gate], arcee_mlx.Request]] = {}


def _letting_go(function: Callable[[Engine, Gate], arcee_mlx.Request]) -> Callable[[Engine, Gate], arcee_mlx.Request]:
    LETTING_GO[function.__name__.strip("_")] = function
    return function


@_letting_go
def _break(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    for _ in (stream := engine.stream("a", endless(200), buffer_chunks=200, logits_processors=[gate])):
        break
    return stream.request


@_letting_go
def _close(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    stream = engine.stream("a", endless(200), buffer_chunks=200, logits_processors=[gate])
    next(stream)
    stream.close()
    return stream.request


@_letting_go
def _del_of_one_never_started(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    return engine.stream("a", endless(200), buffer_chunks=200, logits_processors=[gate]).request


@_letting_go
def _garbage_collection(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    stream = engine.stream("a", endless(200), buffer_chunks=200, logits_processors=[gate])
    request = stream.request
    circle: list[Any] = [stream]
    circle.append(circle)
    del stream, circle
    gc.collect()
    return request


@_letting_go
def _unread_and_paused(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    stream = engine.stream("a", endless(200), buffer_chunks=1)
    gate.entered.set()
    next(stream)
    return stream.request


@_letting_go
def _async_break(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    async def main() -> arcee_mlx.Request:
        async for _ in (stream := engine.astream("a", endless(200), buffer_chunks=200, logits_processors=[gate])):
            break
        assert stream.request
        return stream.request

    return asyncio.run(main())


@_letting_go
def _aclose(engine: Engine, gate: Gate) -> arcee_mlx.Request:
    async def main() -> arcee_mlx.Request:
        async with engine.astream("a", endless(200), buffer_chunks=200, logits_processors=[gate]) as stream:
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert stream.request
        return stream.request

    return asyncio.run(main())


@pytest.mark.parametrize("way", LETTING_GO)
def test_letting_go_of_a_stream_cancels_it_and_frees_its_memory(engine: Engine, way: str) -> None:
    engine.generate("a", endless(3))
    settle(engine)
    before = mx.get_active_memory()
    gate = Gate(at=3)  # lets the first chunk out, and no more than that before it is let go of
    request = None
    try:
        request = LETTING_GO[way](engine, gate)
        gc.collect()
    finally:
        gate.open()
    answer = request.result(PATIENCE_S)
    assert answer.stop_reason == "cancelled" and len(answer.tokens) <= 4
    del gate
    settle(engine)
    assert mx.get_active_memory() - before < 64 * 1024  # of a cache that would have 256 kB


@pytest.mark.parametrize("at", ["submitting", "first chunk", "later chunk"])
def test_cancelling_the_task_that_waits_cancels_the_request(
    engine: Engine, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(at=0 if at == "first chunk" else 3)
    submitted: list[arcee_mlx.Request] = []
    holding = Gate()
    submit = Engine._submit

    def slow_submit(self: Engine, *args: Any) -> list[arcee_mlx.Request]:
        if at == "submitting":
            holding(None, None)  # type: ignore[arg-type]
        submitted.extend(submit(self, *args))
        return submitted

    monkeypatch.setattr(Engine, "_submit", slow_submit)

    async def main() -> None:
        stream = engine.astream("a", endless(200), buffer_chunks=200, logits_processors=[gate])
        chunks: list[Any] = []

        async def read() -> None:
            async for chunk in stream:
                chunks.append(chunk)

        task = asyncio.create_task(read())
        while not (holding.entered.is_set() or gate.entered.is_set()):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        holding.open()
        gate.open()
        with pytest.raises(StopAsyncIteration):
            while True:
                await anext(stream)

    asyncio.run(main())
    while not submitted:
        pass  # the thread that submits comes to its end by itself
    answer = submitted[0].result(PATIENCE_S)
    assert answer.stop_reason == "cancelled" and len(answer.tokens) <= 4


def test_a_stream_closed_while_it_is_submitted_gives_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    holding = Gate()
    submit = Engine._submit
    monkeypatch.setattr(Engine, "_submit", lambda self, *args: (holding(None, None), submit(self, *args))[1])  # type: ignore[arg-type]

    async def main() -> None:
        stream = engine.astream("a", endless(200))
        task = asyncio.create_task(_first(stream))
        while not holding.entered.is_set():
            await asyncio.sleep(0)
        await stream.aclose()
        holding.open()
        with pytest.raises((StopAsyncIteration, RuntimeError)):
            await task
        assert stream.request and stream.request.result(PATIENCE_S).stop_reason == "cancelled"

    asyncio.run(main())


def test_ctrl_c_while_waiting_cancels(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from arcee_mlx import Request

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    stream = engine.stream("a", endless(200), buffer_chunks=1)
    submitted: list[Request] = []
    submit = Engine._submit
    monkeypatch.setattr(Engine, "_submit", lambda self, *a: submitted.extend(submit(self, *a)) or submitted)
    with monkeypatch.context() as patch:
        patch.setattr(Request, "next_chunk", interrupted)
        patch.setattr(Request, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        with pytest.raises(KeyboardInterrupt):
            engine.generate("a", endless(200))
    assert stream.request.result(PATIENCE_S).stop_reason == "cancelled"
    assert submitted[0].result(PATIENCE_S).stop_reason == "cancelled"
