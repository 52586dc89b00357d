"""Where one state of the engine turns into another: a pause, the first token, a close, the end of the main thread."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from arcee_mlx import CallbackError, Engine, EngineClosedError, Request
from arcee_mlx.engine import scheduler
from arcee_mlx.engine.batch import Batch

from engine_script import GREEDY, PATIENCE_S, endless, run_on_owner

ROOT = Path(__file__).parent.parent.parent


def fail(_tokens: mx.array, _logits: mx.array) -> mx.array:
    raise KeyError("mine")


def idle(engine: Engine) -> bool:
    return not run_on_owner(engine, lambda: engine._owner.scheduler.has_work)


# Pauses.


def test_one_after_the_other_is_let_in_beside_answers_that_nobody_reads(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_batch_size=1) as engine:
        unread = [engine.stream("a", endless(50), buffer_chunks=2) for _ in range(3)]
        while not (all(stream.request._chunks for stream in unread) and idle(engine)):
            pass  # until all of them are paused
        # In one turn, so that the second finds the first in its place and nothing else wakes the engine when it is free.
        requests = run_on_owner(engine, lambda: [engine.submit("b", endless(5)) for _ in range(3)])
        assert [len(request.result(PATIENCE_S).tokens) for request in requests] == [5] * 3
        texts = ["".join(chunk.text for chunk in stream) for stream in unread]
        assert texts == [engine.generate("a", endless(50)).text] * 3


@pytest.mark.parametrize("buffer_chunks", [4, 9])
def test_an_answer_goes_on_when_half_of_what_waits_is_read_and_not_at_every_chunk(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, buffer_chunks: int
) -> None:
    begun = 0
    begin = Batch.begin

    def count(self: Batch, row: Any) -> Any:
        nonlocal begun
        begun += 1
        return begin(self, row)

    monkeypatch.setattr(Batch, "begin", count)
    with Engine.load(checkpoint) as engine:
        stream = engine.stream("a", endless(60), buffer_chunks=buffer_chunks)
        chunks = []
        while True:
            while not (stream.request._chunks and idle(engine)):
                pass
            if (chunk := next(stream, None)) is None:
                break
            chunks.append(chunk)
    assert len(chunks) == 60
    assert begun <= 2 + 60 / (buffer_chunks / 2)


# The first token.


def test_a_cancel_with_the_last_chunk_of_a_prompt_samples_no_token(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks, begun = 0, 0
    fill, begin = scheduler.fill_cache, Batch.begin

    def fill_and_cancel(*args: Any) -> None:
        nonlocal chunks
        fill(*args)
        chunks += 1
        if chunks == 4:
            requests[0].cancel()

    def count(self: Batch, row: Any) -> Any:
        nonlocal begun
        begun += 1
        return begin(self, row)

    monkeypatch.setattr(scheduler, "fill_cache", fill_and_cancel)
    monkeypatch.setattr(Batch, "begin", count)
    with Engine.load(checkpoint, prefill_step_size=10) as engine:
        requests: list[Request] = []
        run_on_owner(engine, lambda: requests.append(engine.submit([5] * 41, endless(20))))
        assert requests[0].result(PATIENCE_S).stop_reason == "cancelled"
    assert (chunks, begun) == (4, 0)


# The end.


def test_a_request_between_the_last_look_and_the_end_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(checkpoint)
    submit = engine._owner.submit

    def close_first(requests: list[Request]) -> None:  # when the engine has been seen to be open
        engine.close()
        submit(requests)

    monkeypatch.setattr(engine._owner, "submit", close_first)
    with pytest.raises(EngineClosedError):
        engine.submit("a", GREEDY)


@pytest.fixture
def before() -> Iterator[int]:
    gc.collect()
    yield mx.get_active_memory()


@pytest.mark.parametrize("kept", ["answers", "a failed request"])
def test_closing_frees_the_model_whatever_the_app_still_holds(checkpoint: Path, before: int, kept: str) -> None:
    engine = Engine.load(checkpoint)
    weights = engine._owner.budget.weights_bytes
    held: list[Any] = []
    if kept == "answers":
        held += [engine.generate("a", GREEDY), engine.submit("b", GREEDY), engine.stream("c", GREEDY)]
    else:
        held.append(engine.submit("a", GREEDY, logits_processors=[fail]))
        with pytest.raises(CallbackError, match="mine") as caught:
            held[0].result(PATIENCE_S)
        held.append(caught)
        assert 'raise KeyError("mine")' in "".join(caught.value.__notes__)  # where it came from is not lost
    engine.close()
    gc.collect()
    assert mx.get_active_memory() - before < weights // 4


def test_an_error_that_is_raised_again_and_again_does_not_grow(checkpoint: Path) -> None:
    def count_frames(request: Request) -> int:
        with pytest.raises(CallbackError) as caught:
            request.result(PATIENCE_S)
        return len(caught.traceback)

    with Engine.load(checkpoint) as engine:
        request = engine.submit("a", GREEDY, logits_processors=[fail])
        first = count_frames(request)
        assert [count_frames(request) for _ in range(5)] == [first] * 5


def test_ended_requests_that_an_app_keeps_count_for_nothing(checkpoint: Path) -> None:
    with Engine.load(checkpoint, max_batch_size=1, max_queue=1) as engine:
        kept = [engine.submit("a", endless(1)) for _ in range(1)]
        for _ in range(10):
            kept[-1].result(PATIENCE_S)
            kept.append(engine.submit("a", endless(1)))
        kept[-1].result(PATIENCE_S)
        engine.submit("a", endless(1)).result(PATIENCE_S)
        assert len(engine._open_requests) <= 2


def test_a_thread_may_import_load_and_generate_when_the_main_thread_has_ended(checkpoint: Path) -> None:
    program = f"""
import threading
def work():
    threading.main_thread().join()  # from here on Python is on its way out
    import mlx.core as mx
    mx.set_default_device(mx.cpu)
    from arcee_mlx import Engine, GenerateOptions, generate, load
    options = GenerateOptions(max_tokens=5, temp=0)
    with Engine.load({str(checkpoint)!r}) as engine:
        print(engine.generate("a", options).text == generate(*load({str(checkpoint)!r}), "a", options))
threading.Thread(target=work).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
