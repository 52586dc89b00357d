"""The end of an engine: after `close` every call says so, nobody waits for ever, and one that is forgotten ends itself."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import arcee_mlx
from arcee_mlx import Engine, EngineClosedError, GenerateOptions
from arcee_mlx.generate.answer import join_chunks

from engine_script import GREEDY, LONG, PATIENCE_S, Gate, said

SAMPLED = GenerateOptions(max_tokens=8, temp=1.0, top_k=40, seed=11)


def test_after_closing_every_call_says_so(checkpoint: Path, tmp_path: Path) -> None:
    engine = Engine.load(checkpoint, max_batch_size=1)
    session, idle = engine.session(), engine.astream("a", GREEDY)
    gate = Gate()
    stream = engine.stream("a", LONG, logits_processors=[gate])
    gate.wait()
    waiting, ended = engine.submit("b", GREEDY), []
    reader = threading.Thread(target=lambda: ended.append(pytest.raises(EngineClosedError, list, stream)))
    reader.start()
    closing = [threading.Thread(target=engine.close) for _ in range(4)]
    for thread in closing:
        thread.start()
    while not engine.is_closed:
        pass
    gate.open()
    for thread in [*closing, reader]:
        thread.join()
    engine.close()
    assert ended and not engine._owner.is_alive() and engine.config.vocab_size == 400

    async def read(stream: arcee_mlx.AsyncAnswerStream) -> None:
        async for _ in stream:
            pass

    calls: list[Callable[[], object]] = [
        lambda: engine.submit("a"),
        lambda: engine.generate("a"),
        lambda: engine.generate_answers("a", SAMPLED, n=2),
        lambda: engine.stream("a"),
        lambda: engine.astream("a"),
        lambda: asyncio.run(read(idle)),
        engine.session,
        lambda: engine.load_session(tmp_path / "x.safetensors"),
        engine.stats,
        lambda: session.send("a"),
        lambda: asyncio.run(read(session.asend("a"))),
        lambda: session.save(tmp_path / "x.safetensors"),
        waiting.result,
        stream.request.result,
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(EngineClosedError, match="the engine is closed; expected an open one"):
            call()
    waiting.cancel()
    assert waiting.state == stream.request.state == "failed"
    with engine, pytest.raises(EngineClosedError):
        engine.generate("a")


def test_closing_waits_no_longer_than_asked_and_says_where_the_engine_is(checkpoint: Path) -> None:
    engine, gate = Engine.load(checkpoint), Gate()
    request = engine.submit("a", LONG, logits_processors=[gate])
    gate.wait()
    for _ in range(2):
        with pytest.raises(TimeoutError, match=r"still at line \d+ of wait in .*threading.py after 0 s"):
            engine.close(timeout_s=0)
        assert engine.is_closed
        with pytest.raises(EngineClosedError):
            engine.submit("a")
    gate.open()
    engine.close(timeout_s=PATIENCE_S)
    assert not engine._owner.is_alive()
    engine.close(timeout_s=0)
    with pytest.raises(EngineClosedError):
        request.result()


def test_what_ended_before_the_engine_closed_stays_readable(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        stream = engine.stream("a", GREEDY)
        answer = stream.request.result()
    assert stream.request.result() is answer and said(join_chunks(list(stream))) == said(answer)


def test_a_forgotten_engine_finishes_what_was_asked_and_ends_its_thread(checkpoint: Path) -> None:
    engine = Engine.load(checkpoint)
    owner, gate = engine._owner, Gate()
    request = engine.submit("a", LONG, logits_processors=[gate])
    gate.wait()
    del engine
    gc.collect()
    gate.open()
    owner.join(60)
    assert not owner.is_alive()
    assert request.result().stop_reason == "max_tokens"


def test_a_session_keeps_its_engine(checkpoint: Path) -> None:
    session = Engine.load(checkpoint).session(options=GREEDY)
    gc.collect()
    assert list(session.send("a"))
    owner = session._owner
    del session
    gc.collect()
    owner.join(60)
    assert not owner.is_alive()
