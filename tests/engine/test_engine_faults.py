"""A fault at any stage of the engine's loop, or in a caller's own function, ends whom it concerns, and nobody else."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import (
    DEMO_MODEL,
    ArceeError,
    CallbackError,
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

PATIENCE_S = 60.0  # who waits longer has found a hang
SEED = 666  # by which a fault knows the request it is for
GREEDY = GenerateOptions(temp=0, max_tokens=8, logit_bias={3: -1e9}, prefill_step_size=8)
LONE = replace(GREEDY, kv_bits=8)
MLX_SAYS = RuntimeError("[METAL] Command buffer execution failed: Internal Error (0000000e)")
# Each its options, in the order they are sent; three are answered at once, so that `next` waits for a place.
NEIGHBOURS = {
    "beside": ("The old harbour was quiet that morning, and", replace(GREEDY, max_tokens=16)),
    "lone": ("Once upon a time there was a", replace(LONE, max_tokens=16)),
}
NEXT = {"next": ("In the beginning", GREEDY)}
VICTIM = "It was a dark and stormy night, and the captain of the ship looked out over the sea and said to the men that"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(DEMO_MODEL, max_batch_size=3) as engine:
        yield engine


@pytest.fixture(scope="module")
def alone() -> Callable[..., tuple[int, ...]]:
    """The tokens of the plain loop, computed once for each prompt and options."""
    loaded = arcee_mlx.load(DEMO_MODEL)
    known: dict[str, tuple[int, ...]] = {}

    def compute(prompt: Any, options: GenerateOptions) -> tuple[int, ...]:
        name = repr((prompt, options))
        if name not in known:
            known[name] = tuple(c.token for c in arcee_mlx.stream_generate(*loaded, prompt, options))
        return known[name]

    return compute


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


@dataclass
class Scene:
    """Requests that are in the engine together, and how each ended."""

    engine: Engine
    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)

    def play(self, options: GenerateOptions, *, ungiven_tokens: int = 0, **victim: Any) -> None:
        """Sends all while the loop stands still, and reads them to their end.

        Args:
            ungiven_tokens: made, but not handed over.
        """
        before = self.engine.stats()
        gate = threading.Event()
        self.engine._owner._inbox.put(lambda: gate.wait(PATIENCE_S))
        requests = {name: self.engine.submit(*given) for name, given in NEIGHBOURS.items()}
        args = {"logits_processors": (), "deadline_s": None, "wait": True, "buffer_chunks": None, "on_end": None}
        requests["victim"] = self.engine._submit_one(
            encode_victim(self.engine), replace(options, seed=SEED), **(args | victim)
        )
        requests |= {name: self.engine.submit(*given) for name, given in NEXT.items()}
        gate.set()
        for name in ("beside", "lone", "next", "victim"):
            self._read(name, requests[name])
        in_batch = self.engine._owner.call(lambda: len(self.engine._owner.scheduler._batch))
        after = self.engine.stats()
        assert (in_batch, after.active, after.queued) == (0, 0, 0)
        assert after.failed - before.failed == len(self.errors)
        assert after.done - before.done == len(requests) - len(self.errors)
        given = sum(map(len, self.tokens.values()))
        assert after.generated_tokens - before.generated_tokens == given + ungiven_tokens

    def _read(self, name: str, request: Request) -> None:
        self.tokens[name] = []
        try:
            while (chunk := request.next_chunk()) is not None:
                self.tokens[name].append(chunk.token)
            assert request.result().tokens == tuple(self.tokens[name])
        except Exception as error:
            self.errors[name] = error
            with pytest.raises(type(error)):
                request.result(0)
            assert request.state == "failed"

    def check(self, alone: Callable[..., tuple[int, ...]], options: GenerateOptions, fails: Sequence[str]) -> None:
        """That these failed; that all others have the whole right answer; that the next have it, too."""
        assert sorted(self.errors) == sorted(fails), self.errors
        for name, (prompt, own) in (NEIGHBOURS | NEXT | {"victim": (encode_victim(self.engine), options)}).items():
            expected = alone(prompt, own)
            got = tuple(self.tokens[name])
            assert got == (expected[: len(got)] if name in fails else expected), name
            if name in ("beside", "victim"):
                assert self.engine.generate(prompt, own).tokens == expected, f"{name} after the fault"


def encode_victim(engine: Engine) -> list[int]:
    """Its prompt without the token that all others begin with, so that no prefix of theirs is one of its."""
    return engine.tokenizer.encode(VICTIM, add_special_tokens=False)


def is_victim(first: Any, *others: Any) -> bool:
    """Whether one of a function's arguments is, or belongs to, the victim."""
    for each in (first, *others):
        for path in (each, getattr(each, "options", None), getattr(each, "_request", None)):
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


def raise_it(error: BaseException) -> Callable[[mx.array], Any]:
    def act(_logits: mx.array) -> Any:
        raise error

    return act


MISTAKES: dict[str, tuple[Callable[[mx.array], Any], type[ArceeError], str]] = {
    "raises": (raise_it(ValueError("mine")), CallbackError, "raised ValueError: mine"),
    "exits": (raise_it(SystemExit(1)), CallbackError, "raised SystemExit: 1"),
    "stops": (raise_it(StopIteration()), CallbackError, "raised StopIteration"),
    "interrupts": (raise_it(KeyboardInterrupt()), CallbackError, "raised KeyboardInterrupt"),
    "one_of_ours": (raise_it(InputError("mine")), CallbackError, "raised InputError: mine"),
    "shape": (lambda logits: logits[0], CallbackError, "expected logits of shape"),
    "wider": (lambda logits: mx.concatenate([logits, logits], axis=1), CallbackError, "expected logits of shape"),
    "type": (lambda logits: logits.tolist(), CallbackError, "returned list"),
    "nothing": (lambda logits: None, CallbackError, "returned NoneType"),
    "nan": (lambda logits: logits * mx.nan, ArceeError, "NaN"),
    "one_nan": (lambda logits: mx.where(mx.arange(logits.shape[1]) == 7, mx.nan, logits), ArceeError, "NaN"),
    "all_forbidden": (lambda logits: mx.full(logits.shape, -mx.inf), ArceeError, "NaN"),
    "infinite": (lambda logits: mx.where(mx.arange(logits.shape[1]) == 7, mx.inf, logits), ArceeError, "NaN"),
}


@pytest.mark.parametrize(("token", "options"), [(0, LONE), (5, GREEDY)], ids=["first_alone", "later_in_batch"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_processors_mistake_ends_its_request_at_that_token(
    engine: Engine, alone: Any, mistake: str, token: int, options: GenerateOptions
) -> None:
    act, kind, words = MISTAKES[mistake]
    count = len(encode_victim(engine))

    def process(tokens: mx.array, logits: mx.array) -> Any:
        return act(logits) if tokens.size == count + token else logits

    scene = Scene(engine)
    scene.play(options, logits_processors=[process])
    scene.check(alone, options, ["victim"])
    error = scene.errors["victim"]
    assert type(error) is kind and words in str(error)
    assert len(scene.tokens["victim"]) == token


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float64], ids=str)
def test_a_processor_may_return_another_dtype(engine: Engine, alone: Any, dtype: mx.Dtype) -> None:
    count = len(encode_victim(engine))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        with mx.stream(mx.cpu):
            return logits.astype(dtype) if tokens.size >= count + 7 else logits

    scene = Scene(engine)
    scene.play(GREEDY, logits_processors=[process])
    assert not scene.errors
    assert len(scene.tokens.pop("victim")) == 8
    for name, tokens in scene.tokens.items():
        assert tuple(tokens) == alone(*(NEIGHBOURS | NEXT)[name]), name


def test_a_processor_may_use_the_engine_but_not_wait_for_it(engine: Engine, alone: Any) -> None:
    seen: dict[str, Any] = {}
    session = engine.session()
    waits: dict[str, Callable[[], Any]] = {
        "generate": lambda: engine.generate(*NEXT["next"]),
        "stream": lambda: next(engine.stream(*NEXT["next"])),
        "astream": lambda: asyncio.run(anext(engine.astream(*NEXT["next"]))),
        "result": lambda: seen["submitted"].result(),
        "send": lambda: list(session.send("Hello")),
        "save": lambda: session.save("never.safetensors"),
    }

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if not seen:
            seen["submitted"] = engine.submit(*NEXT["next"])
            seen["stats"] = engine.stats()
            for name, wait in waits.items():
                with pytest.raises(InputError, match="would wait for itself"):
                    wait()
                seen[name] = True
        return logits

    request = engine.submit(VICTIM, GREEDY, logits_processors=[process])
    assert request.result(PATIENCE_S).tokens == alone(VICTIM, GREEDY)
    assert seen["submitted"].result(PATIENCE_S).tokens == alone(*NEXT["next"])
    assert seen["stats"].queued == 0 and set(waits) < set(seen)


def test_a_processor_may_close_the_engine() -> None:
    engine = Engine.load(DEMO_MODEL)

    def process(_tokens: mx.array, logits: mx.array) -> mx.array:
        engine.close()
        return logits

    neighbour = engine.submit("a", replace(GREEDY, max_tokens=1000))
    request = engine.submit(VICTIM, GREEDY, logits_processors=[process])
    for each in (request, neighbour):
        with pytest.raises(EngineClosedError):
            each.result(PATIENCE_S)
    assert engine.is_closed
    engine.close()


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
