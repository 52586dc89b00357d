"""Engine.astream: the event loop is never blocked, slow readers hold up nobody, and cancelled tasks end their requests."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import AsyncAnswerStream, CallbackError, Engine, EngineClosedError, GenerateOptions, InputError, Request
from arcee_mlx.generate.answer import join_chunks

from engine_script import GREEDY, LONG, PATIENCE_S, Gate, Loaded, alone, said

SAMPLED = GenerateOptions(max_tokens=40, temp=1.0, seed=4, logit_bias={1: -100, 3: -100})


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, max_batch_size=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """In an event loop, which a test that hangs leaves."""

    async def patiently() -> Any:
        async with asyncio.timeout(PATIENCE_S):
            return await work

    return asyncio.run(patiently())


async def read(stream: AsyncAnswerStream) -> list[arcee_mlx.GenerationChunk]:
    return [chunk async for chunk in stream]


async def turn(times: int = 200) -> None:
    """The loop turns so often, as it can while nothing blocks it."""
    for _ in range(times):
        await asyncio.sleep(0)


async def until(done: Any) -> None:
    while not done():
        await asyncio.sleep(0)


async def result(request: Request) -> arcee_mlx.Answer:
    return await asyncio.to_thread(request.result, PATIENCE_S)


def test_the_loop_turns_while_a_request_waits_behind_a_slow_one(engine: Engine, loaded: Loaded) -> None:
    gate = Gate()

    async def app() -> None:
        slow = asyncio.create_task(read(engine.astream("a", GREEDY, logits_processors=[gate])))
        stream = engine.astream("b", SAMPLED)
        quick = asyncio.create_task(read(stream))
        await until(lambda: gate.is_reached and stream.request)
        await turn(1000)
        assert stream.request.state == "queued" and not slow.done() and not quick.done()
        gate.open()
        assert said(join_chunks(await slow)) == said(alone(loaded, "a", GREEDY))
        assert said(join_chunks(await quick)) == said(alone(loaded, "b", SAMPLED))

    run(app())


def test_the_loop_turns_while_a_prompt_is_checked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on, check = threading.Event(), threading.Event(), Engine._check

    def check_slowly(*args: Any) -> Any:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return check(*args)

    monkeypatch.setattr(Engine, "_check", check_slowly)

    async def app() -> None:
        task = asyncio.create_task(read(engine.astream("a", GREEDY)))
        await until(began.is_set)
        await turn()
        assert not task.done()
        go_on.set()
        assert len(await task) == 8

    run(app())


def test_chunks_come_one_by_one(engine: Engine) -> None:
    gate = Gate(tokens=4)

    async def app() -> None:
        stream = engine.astream("a", GREEDY, logits_processors=[gate])
        assert [(await anext(stream)).stats.generation_tokens for _ in range(3)] == [1, 2, 3]
        assert not stream.request.has_ended
        gate.open()
        assert [chunk.stats.generation_tokens for chunk in await read(stream)] == [4, 5, 6, 7, 8]

    run(app())


def test_an_app_that_fills_the_loops_executor_is_served(engine: Engine) -> None:
    async def app() -> None:
        loop, free = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        slow = loop.run_in_executor(None, free.wait, PATIENCE_S)
        assert len(await read(engine.astream("a", GREEDY))) == 8
        free.set()
        assert await slow

    run(app())


@pytest.mark.parametrize("kind", [{}, {"temp": 0.0}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 16}], ids=str)
def test_a_slow_reader_pauses_its_row_alone_and_gets_all(engine: Engine, loaded: Loaded, kind: dict[str, Any]) -> None:
    options = replace(SAMPLED, **kind)

    async def app() -> None:
        stream = engine.astream("a", options, buffer_chunks=4)
        chunks = [await anext(stream)]
        request = stream.request
        # There is one place: the others get through because the paused row has left it.
        for prompt in ("b", "c"):
            assert said(join_chunks(await read(engine.astream(prompt, SAMPLED)))) == said(
                alone(loaded, prompt, SAMPLED)
            )
        assert not request.has_ended and len(request._chunks) <= 1 + 4 + 1  # read, waiting, drawn one step ahead
        chunks += await read(stream)
        assert said(join_chunks(chunks)) == said(alone(loaded, "a", options))

    run(app())


def test_many_streams_on_one_loop(checkpoint: Path, loaded: Loaded) -> None:
    async def app() -> None:
        with Engine.load(checkpoint) as engine:
            prompts = ["a", "b", "Grüße", "the sea", [7], [8, 9], "and", "日本語", "Call", "me"]
            all_chunks = await asyncio.gather(*(read(engine.astream(prompt, SAMPLED)) for prompt in prompts))
            for prompt, chunks in zip(prompts, all_chunks, strict=True):
                assert said(join_chunks(chunks)) == said(alone(loaded, prompt, SAMPLED))

    run(app())


def test_a_task_cancelled_while_it_submits(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    began, go_on, made = threading.Event(), threading.Event(), []
    submit = Engine._submit_one

    def submit_slowly(*args: Any) -> Request:
        began.set()
        assert go_on.wait(PATIENCE_S)
        made.append(submit(*args))
        return made[0]

    monkeypatch.setattr(Engine, "_submit_one", submit_slowly)

    async def app() -> None:
        stream = engine.astream("a", LONG)
        task = asyncio.create_task(read(stream))
        await until(began.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
        await until(lambda: made)
        assert (await result(made[0])).stop_reason == "cancelled"
        assert await read(stream) == []

    run(app())


def test_a_task_cancelled_before_it_began_asks_for_nothing(engine: Engine) -> None:
    before = engine.stats()

    async def app() -> None:
        task = asyncio.create_task(read(engine.astream("a", LONG)))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        engine.astream("never read", LONG)

    run(app())
    assert engine.stats() == before


@pytest.mark.parametrize("tokens", [0, 3])
def test_a_task_cancelled_while_it_waits_for_a_chunk(engine: Engine, tokens: int) -> None:
    gate = Gate(tokens=tokens)

    async def app() -> None:
        stream = engine.astream("a", LONG, logits_processors=[gate])
        task = asyncio.create_task(read(stream))
        await until(lambda: gate.is_reached)
        await turn()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert stream.request.cancel_asked
        gate.open()
        answer = await result(stream.request)
        assert answer.stop_reason == "cancelled" and len(answer.tokens) <= tokens + 1
        assert len(await read(stream)) <= 1  # what was made meanwhile, and the end

    run(app())


@pytest.mark.parametrize("way", ["dropped", "async with", "aclose"])
def test_a_task_cancelled_between_chunks(engine: Engine, way: str) -> None:
    requests: list[Any] = []

    async def consume() -> None:
        stream = engine.astream("a", LONG, buffer_chunks=2)
        await anext(stream)
        requests.append(stream.request)
        if way == "async with":
            async with stream:
                await asyncio.Event().wait()
        elif way == "aclose":
            try:
                await asyncio.Event().wait()
            finally:
                await stream.aclose()
        await asyncio.Event().wait()

    async def app() -> None:
        task = asyncio.create_task(consume())
        await until(lambda: requests)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        answer = await result(requests[0])
        assert answer.stop_reason == "cancelled" and 1 <= len(answer.tokens) <= 5

    run(app())


def test_after_aclose_there_are_no_chunks(engine: Engine) -> None:
    async def app() -> None:
        stream = engine.astream("a", LONG)
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
        assert await read(stream) == [] and (await result(stream.request)).stop_reason == "cancelled"
        unread = engine.astream("a", LONG)
        await unread.aclose()
        assert await read(unread) == [] and unread.request is None

    run(app())


@pytest.mark.parametrize("in_cycle", [False, True])
def test_a_dropped_stream_cancels(engine: Engine, in_cycle: bool) -> None:
    async def app() -> None:
        stream = engine.astream("a", LONG, buffer_chunks=2)
        await anext(stream)
        request = stream.request
        if in_cycle:
            stream.itself = stream  # type: ignore[attr-defined]
        del stream
        gc.collect()
        assert (await result(request)).stop_reason == "cancelled"

    run(app())


def test_leaving_an_async_for_cancels(engine: Engine) -> None:
    async def app() -> None:
        async for _ in engine.astream("a", LONG, buffer_chunks=2):
            break
        (request,) = [each for each in engine._open_requests if each.checked.options.max_tokens == 200]
        assert (await result(request)).stop_reason == "cancelled"

    engine.generate("a", GREEDY)  # of what earlier tests asked for nothing is left in the list
    run(app())


def test_a_loop_that_ends_early_leaves_no_trouble(engine: Engine) -> None:
    async def app() -> AsyncAnswerStream:
        stream = engine.astream("a", SAMPLED)
        await anext(stream)
        return stream

    stream = run(app())
    assert len(stream.request.result().tokens) == 40  # though it can tell nobody of its news


def test_two_tasks_may_not_begin_one_stream(engine: Engine) -> None:
    async def app() -> None:
        stream = engine.astream("a", GREEDY)
        first, second = asyncio.create_task(read(stream)), asyncio.create_task(read(stream))
        with pytest.raises(InputError, match="a second task waits for the first chunk"):
            await second
        assert len(await first) == 8

    run(app())


def test_what_fails_is_raised_where_the_chunk_is_asked_for(engine: Engine, checkpoint: Path) -> None:
    def fail(_: mx.array, logits: mx.array) -> mx.array:
        raise KeyError("mine")

    async def app() -> None:
        stream = engine.astream("a", GREEDY, logits_processors=[fail])
        for _ in range(2):
            with pytest.raises(CallbackError, match="fail raised KeyError"):
                await anext(stream)
        gate, other = Gate(), Engine.load(checkpoint)
        stream = other.astream("a", LONG, logits_processors=[gate])
        task = asyncio.create_task(read(stream))
        await until(lambda: gate.is_reached)
        closing = asyncio.create_task(asyncio.to_thread(other.close))
        await until(lambda: other.is_closed)
        gate.open()
        with pytest.raises(EngineClosedError):
            await task
        await closing

    run(app())
