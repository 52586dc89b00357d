"""A fault at any stage of the engine's loop, or in a caller's own function, ends whom it concerns, and nobody else."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import (
    DEMO_MODEL,
    ArceeError,
    ArceeForCausalLM,
    DeviceError,
    Engine,
    EngineClosedError,
    GenerateOptions,
    InputError,
)
from arcee_mlx.engine import Request, batch, rows, scheduler
from arcee_mlx.engine.memory import MemoryBudget
from arcee_mlx.engine.prefix_cache import PrefixCache
from arcee_mlx.engine.scheduler import Scheduler
from arcee_mlx.generate.row import Row

from engine_scene import (  # noqa: F401 - the fixtures `alone` and `engine`
    GREEDY,
    LONE,
    PATIENCE_S,
    SEED,
    VICTIM,
    Scene,
    demo_alone,
    demo_engine,
    encode_victim,
    make_singular,
)

MLX_SAYS = RuntimeError("[METAL] Command buffer execution failed: Internal Error (0000000e)")


@dataclass
class Fault:
    """Raises once, in place of a function the owner thread calls, or when that has done its work."""

    error: BaseException
    is_after: bool = False
    fired: int = 0
    calls: int = 0

    def inject(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, when: Callable[..., bool], call: int = 0
    ) -> None:
        """In the place of `owner.name`, at that one of the calls for which `when` is true."""
        original = getattr(owner, name)

        def fail_once(*args: Any, **named: Any) -> Any:
            if isinstance(threading.current_thread(), arcee_mlx.engine.owner.Owner) and when(*args):
                self.calls += 1
                if self.calls == call + 1:
                    self.fired += 1
                    if self.is_after:
                        original(*args, **named)
                    raise self.error
            return original(*args, **named)

        patch.setattr(owner, name, fail_once)


def is_victim(first: Any, *others: Any) -> bool:
    """Whether one of a function's arguments is, or belongs to, the victim."""
    for each in (first, *others):
        # Itself, what it has of options, or the request of a Row.
        for path in (each, getattr(each, "options", None), getattr(each, "request", None)):
            options = getattr(path, "options", path)
            if isinstance(options, GenerateOptions) and options.seed == SEED:
                return True
        request = getattr(each, "request", None)  # of an ActiveRow
        if isinstance(request, Request) and request.checked.options.seed == SEED:
            return True
    return False


def begins_as_victim(engine: Engine, start: int = 0) -> Callable[..., bool]:
    ids = encode_victim(engine)

    def check(*args: Any) -> bool:
        lists = [list(arg) for arg in args if isinstance(arg, list | tuple) and arg and isinstance(arg[0], int)]
        return any(each == ids[start : start + len(each)] for each in lists)

    return check


def from_scheduler(*_: Any) -> bool:
    """Whether the function is called there, and not in mlx-lm's loop for one row."""
    return sys._getframe(2).f_globals["__name__"] == scheduler.__name__


def always(*_: Any) -> bool:
    return True


def find_when(engine: Engine, when: Callable[..., Any]) -> Callable[..., bool]:
    return when if when in (is_victim, from_scheduler, always) else when(engine)


PAUSED = {"buffer_chunks": 2}
IN_BATCH = ("beside", "victim")
# stage: where, the function, when; its how manieth such call; the victim's arguments; who fails
STAGES: dict[str, tuple[Any, str, Any, int, dict[str, Any], tuple[str, ...]]] = {
    "measure": (MemoryBudget, "measure", is_victim, 0, {}, ("victim",)),
    "check_beside": (MemoryBudget, "check_beside", always, 0, {"wait": False}, ("victim",)),
    "make_room": (Scheduler, "_make_room", always, 3, {}, ("victim",)),
    "fork": (PrefixCache, "fork", begins_as_victim, 0, {}, ("victim",)),
    "make_prompt_cache": (scheduler, "make_prompt_cache", is_victim, 0, {}, ("victim",)),
    "row": (rows, "Row", is_victim, 0, {}, ("victim",)),
    "first_chunk": (scheduler, "fill_cache", begins_as_victim, 0, {}, ("victim",)),
    "second_chunk": (scheduler, "fill_cache", lambda e: begins_as_victim(e, 8), 0, {}, ("victim",)),
    "keep_prefix": (PrefixCache, "insert", begins_as_victim, 0, {}, ()),
    "begin": (batch.Batch, "begin", is_victim, 0, {}, ("victim",)),
    "join": (batch.Batch, "join", is_victim, 0, {}, IN_BATCH),
    "first_step": (batch.Batch, "step", always, 0, {}, ("beside",)),
    "a_step": (batch.Batch, "step", always, 8, {}, IN_BATCH),
    "first_token": (Row, "add", is_victim, 0, {}, ("victim",)),
    "a_token": (Row, "add", is_victim, 4, {}, ("victim",)),
    "last_token": (Row, "add", is_victim, 7, {}, ("victim",)),
    "keep_answer": (batch.Batch, "extract", is_victim, 0, {}, ()),
    "leave": (batch.Batch, "leave", is_victim, 0, {}, ("beside",)),
    "pause_extract": (batch.Batch, "extract", is_victim, 0, PAUSED, ("victim",)),
    "pause_leave": (batch.Batch, "leave", is_victim, 0, PAUSED, IN_BATCH),
    "resume_begin": (batch.Batch, "begin", is_victim, 1, PAUSED, ("victim",)),
    "resume_join": (batch.Batch, "join", is_victim, 1, PAUSED, ("victim",)),
    "clear_cache": (mx, "clear_cache", from_scheduler, 0, {}, ()),
}


LEAVES_HALF_DONE = ("second_chunk", "begin", "join", "a_step", "leave", "pause_leave")


@pytest.mark.parametrize(
    ("stage", "is_after"), [(stage, False) for stage in STAGES] + [(stage, True) for stage in LEAVES_HALF_DONE]
)
def test_a_fault_of_the_device_ends_those_it_concerns(
    engine: Engine, alone: Any, monkeypatch: pytest.MonkeyPatch, stage: str, is_after: bool
) -> None:
    where, name, when, call, victim, fails = STAGES[stage]
    engine._owner.call(lambda: engine._owner.scheduler.prefixes.shrink(0))
    fault = Fault(MLX_SAYS, is_after)
    fault.inject(monkeypatch, where, name, find_when(engine, when), call)
    scene = Scene(engine)
    scene.play(GREEDY, **victim)
    assert fault.fired == 1
    scene.check(alone, GREEDY, fails)
    for error in scene.errors.values():
        assert type(error) is DeviceError and error.__cause__ is MLX_SAYS
        assert "Command buffer execution failed" in str(error)


def test_a_pass_that_fails_when_computed_is_not_blamed_on_a_processor(
    engine: Engine, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, passes = ArceeForCausalLM.__call__, []

    def fail_once(self: ArceeForCausalLM, ids: mx.array, *args: Any, **named: Any) -> mx.array:
        logits = forward(self, ids, *args, **named)
        passes.append(ids.shape)
        return logits + make_singular() if passes.count((2, 1)) == 3 and ids.shape == (2, 1) else logits

    monkeypatch.setattr(ArceeForCausalLM, "__call__", fail_once)
    scene = Scene(engine)
    scene.play(GREEDY, logits_processors=[lambda _tokens, logits: logits])
    monkeypatch.undo()
    scene.check(alone, GREEDY, IN_BATCH)
    assert {type(error) for error in scene.errors.values()} == {DeviceError}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), DeviceError),
        (KeyError("gone"), ArceeError),
        (SystemExit(3), ArceeError),
        (InputError("one of ours"), InputError),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
@pytest.mark.parametrize("stage", ["row", "first_chunk", "a_step"])
def test_a_fault_of_any_type_becomes_one_of_ours(
    engine: Engine,
    alone: Any,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    error: BaseException,
    kind: type[ArceeError],
) -> None:
    where, name, when, call, _, fails = STAGES[stage]
    engine._owner.call(lambda: engine._owner.scheduler.prefixes.shrink(0))
    fault = Fault(error)
    fault.inject(monkeypatch, where, name, find_when(engine, when), call)
    scene = Scene(engine)
    scene.play(GREEDY)
    assert fault.fired == 1
    scene.check(alone, GREEDY, fails)
    assert {type(each) for each in scene.errors.values()} == {kind}


@pytest.mark.parametrize("step", [0, 5])
def test_a_fault_of_a_row_that_decodes_alone_is_its_own(
    engine: Engine, alone: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = scheduler.step_alone

    def steps_that_fail(model: Any, row: Any) -> Any:
        for i, each in enumerate(original(model, row)):
            if is_victim(row) and i == step:
                raise MLX_SAYS
            yield each

    monkeypatch.setattr(scheduler, "step_alone", steps_that_fail)
    scene = Scene(engine)
    scene.play(LONE)
    monkeypatch.undo()
    scene.check(alone, LONE, ["victim"])
    assert type(scene.errors["victim"]) is DeviceError and len(scene.tokens["victim"]) == step


@pytest.mark.parametrize("ends_by", ["itself", "cancel", "processor"])
def test_a_hook_that_raises_ends_its_request_alone(engine: Engine, alone: Any, ends_by: str) -> None:
    calls: list[Any] = []
    requests: list[Request] = []

    def on_end(answer: Any) -> None:
        calls.append(answer)
        raise KeyError("of the hook")

    def process(_tokens: mx.array, logits: mx.array) -> mx.array:
        if ends_by == "cancel":
            requests[0].cancel()
        if ends_by == "processor":
            raise ValueError("of the processor")
        return logits

    def catch(self: Request, state: Any) -> None:
        if self.checked.options.seed == SEED:
            requests.append(self)
        self._state = state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Request, "move_to", catch)
        scene = Scene(engine)
        ungiven = int(ends_by == "itself")  # the last
        scene.play(GREEDY, ungiven_tokens=ungiven, on_end=on_end, logits_processors=[process])
    assert len(calls) == 1 and (calls[0] is None) is (ends_by == "processor")
    error = scene.errors["victim"]
    assert ("of the processor" if ends_by == "processor" else "of the hook") in str(error)
    scene.check(alone, GREEDY, ["victim"])


@pytest.mark.parametrize("when", ["at_once", "between_steps", "in_a_guard"])
def test_a_loop_that_dies_closes_the_engine_and_nobody_hangs(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    engine = Engine.load(DEMO_MODEL, max_batch_size=2)
    long = replace(GREEDY, max_tokens=1500)
    original = Scheduler.turn

    def die(self: Scheduler) -> None:
        if when == "at_once" or self.stats().decode_steps >= 3:
            raise RuntimeError("the loop is broken")
        original(self)

    def die_in_guard(*_: Any) -> None:
        raise RuntimeError("even a new batch fails")

    gate = threading.Event()
    engine._owner._inbox.put(lambda: gate.wait(PATIENCE_S))
    ended: list[BaseException] = []

    def wait_for(read: Callable[[], object]) -> None:
        try:
            read()
        except Exception as error:
            ended.append(error)

    requests = [engine.submit(VICTIM, long), engine.submit("a", replace(long, kv_bits=8)), engine.submit("b", long)]

    async def read_async() -> None:
        async for _ in engine.astream("c", long):
            pass

    reads: list[Callable[[], object]] = [
        *(request.result for request in requests),
        lambda: list(engine.stream("d", long)),
        lambda: asyncio.run(read_async()),
        lambda: [engine._owner.call(lambda: None) for _ in range(10**6)],
    ]
    threads = [threading.Thread(target=wait_for, args=(read,), daemon=True) for read in reads]
    if when == "in_a_guard":  # a step fails, and so does all that would take its place
        monkeypatch.setattr(batch.Batch, "step", die_in_guard)
        monkeypatch.setattr(scheduler, "Batch", die_in_guard)
    else:
        monkeypatch.setattr(Scheduler, "turn", die)
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a waiter hangs"
    expected = {EngineClosedError, DeviceError} if when == "in_a_guard" else {EngineClosedError}
    assert len(ended) == len(reads) and {type(error) for error in ended} == expected
    engine._owner.join(PATIENCE_S)
    assert reported and reported[0].thread is engine._owner
    assert engine.is_closed and all(request.state == "failed" for request in requests)
    for call in (
        lambda: engine.submit("a"),
        lambda: engine.generate("a"),
        lambda: engine.stream("a"),
        lambda: engine.astream("a"),
        engine.session,
        engine.stats,
    ):
        with pytest.raises(EngineClosedError, match="the engine is closed"):
            call()
    engine.close()


def test_what_ended_is_gone_without_the_garbage_collector(engine: Engine) -> None:
    gc.collect()
    gc.disable()
    try:
        for options in (GREEDY, LONE, replace(GREEDY, temp=1.0, logprobs=True)):
            request = engine.submit(VICTIM, options, logits_processors=[lambda _tokens, logits: logits])
            request.result(PATIENCE_S)
            gone = weakref.ref(request)
            del request
            for _ in range(3):  # the loop lets go of its last names when it turns again
                engine._owner.call(lambda: None)
            assert gone() is None
    finally:
        gc.enable()
