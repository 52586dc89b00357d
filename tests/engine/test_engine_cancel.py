"""A request ends within a step or a chunk of its cancel or deadline, whatever it is doing, and leaves nothing behind."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import AnswerStream, Engine, GenerateOptions, Request

from engine_script import GREEDY, LONG, PATIENCE_S, Gate, Loaded, Work, alone, said, settle

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temp": 1.0},
    "quantized": {"kv_bits": 8, "kv_group_size": 32},
    "rotating": {"max_kv_size": 32},
}
PROMPT = [5 + i for i in range(50)]  # four chunks
ENDINGS = ["cancelled", "deadline"]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint, prefill_step_size=16, prefix_cache_bytes=0, max_batch_size=2) as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    return Work(monkeypatch)


def end(request: Request, reason: str) -> None:
    """Asks for its end now."""
    if reason == "cancelled":
        request.cancel()
    else:
        request.deadline_s = time.monotonic()
        request._wake()


class Later:
    """A hook that ends a request when it is called for the n-th time."""

    def __init__(self, n: int, reason: str) -> None:
        self.left, self.reason = n, reason
        self.known = threading.Event()
        self.request: Request | None = None

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            assert self.known.wait(PATIENCE_S) and self.request
            end(self.request, self.reason)
        return args[1] if args else None

    def tell(self, request: Request) -> Request:
        self.request = request
        self.known.set()
        return request


@pytest.mark.parametrize("reason", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_begins_after_the_end_was_asked_for(
    engine: Engine, loaded: Loaded, work: Work, kind: str, reason: str
) -> None:
    options = replace(LONG, **KINDS[kind])
    work.at_step = Later(5, reason)
    request = work.at_step.tell(engine.submit(PROMPT, options))
    answer = request.result()
    settle(engine)
    assert work.steps == 5 and len(answer.tokens) == 5 and answer.stop_reason == reason
    whole = alone(loaded, PROMPT, replace(options, max_tokens=20, prefill_step_size=16))
    assert answer.tokens == whole.tokens[:5] and whole.text.startswith(answer.text)
    assert answer.stats.generation_tokens == 5 and request.state == "done"


@pytest.mark.parametrize("kind", KINDS)
def test_at_most_the_step_that_runs_is_ended(engine: Engine, work: Work, kind: str) -> None:
    gate = Gate(tokens=4)
    request = engine.submit(PROMPT, replace(LONG, **KINDS[kind]), logits_processors=[gate])
    gate.wait()
    before = work.steps
    request.cancel()
    gate.open()
    answer = request.result()
    settle(engine)
    assert work.steps <= before + 1 and len(answer.tokens) <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_may_cancel_its_own_request(engine: Engine, work: Work, kind: str) -> None:
    later = Later(4, "cancelled")
    request = later.tell(engine.submit(PROMPT, replace(LONG, **KINDS[kind]), logits_processors=[later]))
    assert request.result().stop_reason == "cancelled"
    settle(engine)
    assert work.steps <= 4


@pytest.mark.parametrize("reason", ENDINGS)
@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_no_chunk_is_read_after_the_end_was_asked_for(engine: Engine, work: Work, chunk: int, reason: str) -> None:
    work.at_chunk = Later(chunk, reason)
    request = work.at_chunk.tell(engine.submit(PROMPT, LONG))
    answer = request.result()
    settle(engine)
    assert work.chunks == [16, 16, 16, 1][:chunk] and work.steps == 0
    assert (answer.text, answer.tokens, answer.stop_reason) == ("", (), reason)
    assert answer.stats.prompt_tokens == 50 and answer.stats.generation_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_begins_after_a_cancel_while_anothers_prompt_is_read(engine: Engine, work: Work, kind: str) -> None:
    gate = Gate(tokens=2)
    request = engine.submit([5], replace(LONG, **KINDS[kind]), logits_processors=[gate])
    gate.wait()
    other = engine.submit(PROMPT, GREEDY)
    steps: list[int] = []

    def cancel() -> None:
        if not steps:
            request.cancel()
            steps.append(work.steps)

    work.at_chunk = cancel
    gate.open()
    answer = request.result()
    assert answer.stop_reason == "cancelled" and len(answer.tokens) == steps[0]
    assert len(other.result().tokens) == 8


@pytest.mark.parametrize("reason", ENDINGS)
def test_one_that_waits_is_never_begun(engine: Engine, work: Work, reason: str) -> None:
    gates = [Gate(), Gate()]
    running = [engine.submit("a", GREEDY, logits_processors=[gate]) for gate in gates]
    gates[0].wait()
    waiting = [engine.submit(PROMPT, LONG), engine.submit(PROMPT[:7], GREEDY)]
    end(waiting[0], reason)
    for gate in gates:
        gate.open()
    assert waiting[0].result().stop_reason == reason and waiting[0].result().tokens == ()
    assert len(waiting[1].result().tokens) == 8 and all(len(request.result().tokens) == 8 for request in running)
    assert sum(work.chunks) == 6 + 2 * (running[0].prompt_tokens - 1)


@pytest.mark.parametrize("reason", ENDINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_that_is_paused_ends_though_nothing_computes(engine: Engine, kind: str, reason: str) -> None:
    stream = engine.stream("a", replace(LONG, **KINDS[kind]), buffer_chunks=3)
    first = next(stream)
    while not engine._owner.call(lambda: engine._owner.scheduler._paused):
        pass
    end(stream.request, reason)
    answer = stream.request.result()
    assert answer.stop_reason == reason and 4 <= len(answer.tokens) <= 5
    assert [first, *stream][-1].stats.generation_tokens == len(answer.tokens)  # what was made can still be read
    settle(engine)
    assert engine.stats().active == 0


def test_a_deadline_wakes_the_thread_by_itself(engine: Engine) -> None:
    stream = engine.stream("a", LONG, buffer_chunks=1, deadline_s=0.2)  # unread, so that it cannot end otherwise
    answer = stream.request.result(PATIENCE_S)
    assert answer.stop_reason == "deadline" and len(answer.tokens) <= 2


def test_others_go_on_as_if_it_had_not_been_there(engine: Engine, loaded: Loaded, work: Work) -> None:
    options = GenerateOptions(max_tokens=30, temp=1.0, seed=8, logit_bias={1: -100, 3: -100})
    later = work.at_step = Later(9, "cancelled")
    other = engine.submit("the sea", options)
    request = later.tell(engine.submit(PROMPT, LONG))
    assert said(other.result()) == said(alone(loaded, "the sea", options))
    assert request.result().stop_reason == "cancelled"
    assert said(engine.generate("the sea", options)) == said(alone(loaded, "the sea", options))


def test_a_cancel_that_comes_late_or_twice_changes_nothing(engine: Engine) -> None:
    request = engine.submit("a", GREEDY)
    answer = request.result()
    request.cancel()
    assert request.result() is answer and answer.stop_reason == "max_tokens" and not request.cancel_asked
    request = engine.submit("a", LONG)
    for _ in range(3):
        request.cancel()
    answer = request.result()
    request.cancel()
    assert request.result() is answer and answer.stop_reason == "cancelled"


def drop(stream: AnswerStream, way: str) -> None:
    if way == "close":
        next(stream)
        stream.close()
    elif way == "with":
        with stream:
            next(stream)
    elif way == "break":
        for _ in stream:
            break
    elif way == "error":
        with pytest.raises(KeyError):
            for _ in stream:
                raise KeyError
    elif way == "cycle":
        next(stream)
        stream.itself = stream  # type: ignore[attr-defined]
    else:
        assert way == "never started"


@pytest.mark.parametrize("way", ["close", "with", "break", "error", "cycle", "never started"])
def test_a_stream_that_is_let_go_of_cancels(engine: Engine, way: str) -> None:
    stream = engine.stream("a", LONG, buffer_chunks=2)
    request = stream.request
    drop(stream, way)
    del stream
    gc.collect()
    answer = request.result(PATIENCE_S)
    assert answer.stop_reason == "cancelled" and len(answer.tokens) <= 5


def test_ctrl_c_cancels_what_it_waits_for(engine: Engine) -> None:
    def press(_: mx.array, logits: mx.array) -> mx.array:
        if not pressed:
            pressed.extend(request for request in engine._open_requests if not request.has_ended)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            until_s = time.monotonic() + PATIENCE_S
            while not pressed[0].cancel_asked:
                assert time.monotonic() < until_s
        return logits

    for ask in (engine.generate, lambda *args, **given: list(engine.stream(*args, **given))):
        pressed: list[Request] = []
        with pytest.raises(KeyboardInterrupt):
            ask(PROMPT, LONG, logits_processors=[press])
        (request,) = pressed
        assert request.result().stop_reason == "cancelled"


def test_its_memory_is_free_again(checkpoint: Path) -> None:
    with Engine.load(checkpoint, prefix_cache_bytes=0, prefill_step_size=64) as engine:
        prompt = [5 + i for i in range(150)]
        options = replace(LONG, max_tokens=100)
        engine.generate(prompt[:3], GREEDY)
        gc.collect()
        settle(engine)
        before = mx.get_active_memory()
        cache_bytes = len(prompt) * engine._owner.budget.kv_token_bytes
        for kind, changes in KINDS.items():
            stream = engine.stream(prompt, replace(options, **changes), buffer_chunks=4)
            next(stream)
            if kind == "greedy":
                assert mx.get_active_memory() >= before + cache_bytes
            request = stream.request
            del stream
            assert request.result().stop_reason == "cancelled"
            settle(engine)
            assert mx.get_active_memory() < before + cache_bytes // 50, kind
