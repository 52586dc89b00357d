"""The end: close from anywhere, a forgotten engine, another process, and programs that end whatever they had running."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from arcee_mlx import Engine, EngineClosedError, GenerateOptions
from arcee_mlx.engine.scheduler import Scheduler

from engine_data import GREEDY, PATIENCE_S, Gate, endless, run_threads

ROOT = Path(__file__).parent.parent.parent


def doors(engine: Engine) -> dict[str, Callable[[], Any]]:
    async def first() -> None:
        await anext(engine.astream("a", GREEDY))

    return {
        "generate": lambda: engine.generate("a", GREEDY),
        "submit": lambda: engine.submit("a", GREEDY),
        "stream": lambda: engine.stream("a", GREEDY),
        "generate_answers": lambda: engine.generate_answers("a", GenerateOptions(temp=1), n=2),
        "astream": lambda: asyncio.run(first()),
        "stats": engine.stats,
    }


def assert_closed(engine: Engine) -> None:
    assert engine.is_closed
    for name, door in doors(engine).items():
        with pytest.raises(EngineClosedError, match="the engine is closed; expected an open one"):
            door()
            pytest.fail(f"{name} took a call")
    engine.close()


def test_closed_is_closed_however_often(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        assert not engine.is_closed
        engine.generate("a", GREEDY)
    assert_closed(engine)
    assert not engine._owner.is_alive()
    assert engine.config.vocab_size == 400  # what needs no thread still works
    assert run_threads(4, lambda _: engine.close()) == [None] * 4


def test_requests_that_have_not_ended_are_told(checkpoint: Path) -> None:
    engine = Engine.load(checkpoint, max_batch_size=2)
    gate = Gate(at=2)
    paused = engine.stream("a", endless(50), buffer_chunks=1)
    running = engine.submit("a", endless(50), logits_processors=[gate])
    gate.wait()
    waiting = [engine.submit("b", endless(5)) for _ in range(3)]
    done = []
    closers = [threading.Thread(target=lambda: done.append(engine.close())) for _ in range(3)]
    for closer in closers:
        closer.start()
    while not engine.is_closed:
        pass
    with pytest.raises(EngineClosedError):
        engine.submit("c", GREEDY)
    gate.open()
    for closer in closers:
        closer.join(PATIENCE_S)
    assert done == [None] * 3
    for request in (running, paused.request, *waiting):
        with pytest.raises(EngineClosedError):
            request.result(PATIENCE_S)
        assert request.state == "failed"
    with pytest.raises(EngineClosedError):
        list(paused)
    assert_closed(engine)


def test_an_asynchronous_reader_is_told(checkpoint: Path) -> None:
    engine = Engine.load(checkpoint)

    async def main() -> None:
        stream = engine.astream("a", endless(200), buffer_chunks=1)
        await anext(stream)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineClosedError):
            while True:
                await anext(stream)

    asyncio.run(main())


def test_it_may_be_closed_by_its_own_thread(checkpoint: Path) -> None:
    engine = Engine.load(checkpoint)

    def close(_tokens: mx.array, logits: mx.array) -> mx.array:
        engine.close()
        return logits

    request = engine.submit("a", endless(50), logits_processors=[close])
    with pytest.raises(EngineClosedError):
        request.result(PATIENCE_S)
    engine.close()
    assert not engine._owner.is_alive()


def test_no_request_is_lost_between_a_submit_and_a_close(checkpoint: Path) -> None:
    for _ in range(5):
        engine = Engine.load(checkpoint)
        ends: list[str] = []

        def submit(i: int, engine: Engine = engine, ends: list[str] = ends) -> None:
            if i == 0:
                engine.generate("a", endless(2))
                engine.close()
                return
            while True:
                try:
                    engine.submit("a", endless(3)).result(PATIENCE_S)
                except EngineClosedError:
                    ends.append("closed")
                    return

        results = run_threads(6, submit)
        assert results == [None] * 6 and ends == ["closed"] * 5


def test_a_request_that_comes_between_the_last_look_and_the_end_is_told(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.load(checkpoint)
    submit = engine._owner.submit

    def close_first(requests: list[Any]) -> None:  # after the engine was seen to be open
        engine.close()
        submit(requests)

    monkeypatch.setattr(engine._owner, "submit", close_first)
    with pytest.raises(EngineClosedError):
        engine.submit("a", GREEDY)


def test_a_loop_that_dies_tells_everybody(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.load(checkpoint)
    seen: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", seen.append)
    gate = Gate()
    request = engine.submit("a", endless(50), logits_processors=[gate])
    gate.wait()
    waiting = engine.submit("b", endless(50))

    def die(self: Scheduler) -> None:
        raise RuntimeError("the loop itself")

    monkeypatch.setattr(Scheduler, "turn", die)
    gate.open()
    for each in (request, waiting):
        with pytest.raises(EngineClosedError):
            each.result(PATIENCE_S)
    engine.close()
    assert_closed(engine)
    assert [str(args.exc_value) for args in seen] == ["the loop itself"]


def active_bytes() -> int:
    gc.collect()
    return mx.get_active_memory()


@pytest.mark.parametrize("kept", ["nothing", "results", "a failed request"])
def test_closing_frees_the_model_whatever_is_still_held(checkpoint: Path, kept: str) -> None:
    def fail(_tokens: mx.array, _logits: mx.array) -> mx.array:
        raise KeyError("mine")

    before = active_bytes()
    engine = Engine.load(checkpoint)
    weights = engine._owner.budget.weights_bytes
    assert active_bytes() - before >= weights
    held: list[Any] = []
    if kept == "results":
        held += [engine.generate("a", GREEDY), engine.submit("b", GREEDY), engine.stream("c", GREEDY)]
    if kept == "a failed request":
        held.append(engine.submit("a", GREEDY, logits_processors=[fail]))
        with pytest.raises(Exception, match="mine") as caught:
            held[0].result(PATIENCE_S)
        held.append(caught)
        assert 'raise KeyError("mine")' in "".join(caught.value.__notes__)  # where it came from is not lost
    engine.close()
    assert active_bytes() - before < weights // 4


def test_a_forgotten_engine_ends_by_itself(checkpoint: Path) -> None:
    before = active_bytes()
    engine = Engine.load(checkpoint)
    engine.generate("a", GREEDY)
    owner, gone = engine._owner, weakref.ref(engine)
    del engine
    gc.collect()
    owner.join(PATIENCE_S)
    assert gone() is None and not owner.is_alive()
    assert active_bytes() - before < owner.budget.weights_bytes // 4


def test_what_is_left_running_is_finished_before_a_forgotten_engine_ends(checkpoint: Path) -> None:
    expected = Engine.load(checkpoint).generate("a", endless(40)).text
    assert Engine.load(checkpoint).submit("a", endless(40)).result(PATIENCE_S).text == expected
    assert (
        "".join(chunk.text for chunk in Engine.load(checkpoint).stream("a", endless(40), buffer_chunks=3)) == expected
    )


def test_a_load_that_fails_leaves_no_thread(checkpoint: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(Exception, match="nothing"):
        Engine.load(tmp_path / "nothing")
    with pytest.raises(Exception, match="the weights take"):
        Engine.load(checkpoint, memory_budget_bytes=1000)
    for thread in threading.enumerate():
        if thread.name == "arcee_mlx-engine":
            thread.join(PATIENCE_S)
    assert threading.active_count() <= before


HEAD = """
import asyncio, os, threading, time
from arcee_mlx import Engine, EngineClosedError, GenerateOptions, generate, load
OPTIONS = GenerateOptions(max_tokens=30, temp=0, logit_bias={1: -1e9, 3: -1e9})
LONG = GenerateOptions(max_tokens=200, temp=0, logit_bias={1: -1e9, 3: -1e9})
def note(): print("last", time.time(), flush=True)
"""
PROGRAMS = {
    "a plain generate in a thread": """
def work():
    generate(*load(MODEL), "a", OPTIONS); note()
threading.Thread(target=work).start()
""",
    "threads that are joined": """
def work():
    generate(*load(MODEL), "a", OPTIONS); note()
for _ in range(3):
    thread = threading.Thread(target=work); thread.start(); thread.join()
""",
    "an engine loaded and used in a thread": """
def work():
    engine = Engine.load(MODEL)
    engine.generate("a", OPTIONS); note()
threading.Thread(target=work).start()
""",
    "all of it in a thread": """
def work():
    from arcee_mlx import Engine
    with Engine.load(MODEL) as engine:
        engine.generate("a", OPTIONS); note()
threading.Thread(target=work).start()
""",
    "a live engine": """
engine = Engine.load(MODEL)
engine.generate("a", OPTIONS); note()
""",
    "a running request": """
engine = Engine.load(MODEL)
request = engine.submit("a", LONG); note()
""",
    "a paused stream": """
engine = Engine.load(MODEL)
stream = engine.stream("a", LONG, buffer_chunks=1); next(stream); note()
""",
    "an application's thread that waits for a result": """
engine = Engine.load(MODEL)
def work():
    assert len(engine.submit("a", OPTIONS).result().tokens) == 30; note()
threading.Thread(target=work).start()
""",
    "daemon threads that wait": """
engine = Engine.load(MODEL)
def work():
    try:
        while True: engine.generate("a", LONG)
    except EngineClosedError:
        pass
for _ in range(4): threading.Thread(target=work, daemon=True).start()
engine.generate("a", OPTIONS); note()
""",
    "an abandoned event loop": """
engine = Engine.load(MODEL)
async def main():
    stream = engine.astream("a", LONG, buffer_chunks=1)
    await anext(stream); note()
asyncio.run(main())
""",
    "an exception": """
import sys
engine = Engine.load(MODEL)
engine.generate("a", OPTIONS); note()
sys.exit(0)
""",
    "two engines": """
engines = [Engine.load(MODEL) for _ in range(2)]
requests = [engine.submit("a", LONG) for engine in engines]
[engine.generate("b", OPTIONS) for engine in engines]; note()
""",
    "an engine used at exit": """
import atexit
engine = Engine.load(MODEL)
@atexit.register
def last():
    engine.generate("a", OPTIONS); note()
""",
    "a forked child": """
engine = Engine.load(MODEL)
request = engine.submit("a", LONG)
child = os.fork()
if child == 0:
    code = 0
    for door in (lambda: engine.generate("a"), lambda: engine.submit("a"), engine.stats, request.result, lambda: engine.stream("a"),
                 lambda: engine.astream("a")):
        try: door(); code = 1
        except EngineClosedError: pass
    engine.close()
    os._exit(code if engine.is_closed else 2)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert len(request.result().tokens) == 200; note()
""",
}


OFTEN = [
    "a plain generate in a thread",
    "an engine loaded and used in a thread",
    "a running request",
]  # even in a short run
# Forks one child after the other, all of which end as a program does, with imports done that would take most of the time.
RUNNER = """
import json, os, sys, time
import mlx.core as mx
mx.set_default_device(mx.cpu)
import arcee_mlx, arcee_mlx.upstream
arcee_mlx.upstream.mlx_lm_module("generate")
programs, times, often = json.loads(sys.stdin.read())
def run_all():
    for name, program in programs.items():
        for _ in range(max(times, 3 if name in often else 1)):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.dup2(write, 1); os.dup2(write, 2); os.close(read); os.close(write)
                return program
            os.close(write)
            output = open(read).read()
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            print(json.dumps([name, status, output, time.time()]), flush=True)
program = run_all()
if program: exec(program)
"""


def run(program: str, given: str, folder: Path, timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program], input=given,
        env=environment, cwd="/", capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip


def check_end(status: int, output: str, ended_s: float) -> float:
    """Seconds from the last token to the end. A second is promised; here only hangs fail, as the machine may be busy."""
    assert status == 0, output
    lines = output.splitlines()
    assert lines and all(line.startswith("last ") for line in lines), output
    after_s = ended_s - float(lines[-1].split()[1])
    assert after_s < 10
    return after_s


@pytest.fixture(scope="module")
def ends(checkpoint: Path, request: pytest.FixtureRequest) -> dict[str, list[tuple[int, str, float]]]:
    """(status, output, time of the end) of every run of every program."""
    programs = {name: f"MODEL = {str(checkpoint)!r}\n{HEAD}\n{program}" for name, program in PROGRAMS.items()}
    times = 20 if request.config.getoption("--slow") else 1
    done = run(RUNNER, json.dumps([programs, times, OFTEN]), checkpoint, 40 * times * len(programs))
    assert done.returncode == 0, done.stderr
    results: dict[str, list[tuple[int, str, float]]] = {name: [] for name in programs}
    for line in done.stdout.splitlines():
        name, *result = json.loads(line)
        results[name].append(tuple(result))
    return results


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_ends_soon_after_its_last_token(ends: dict[str, list[tuple[int, str, float]]], name: str) -> None:
    assert len(ends[name]) >= (3 if name in OFTEN else 1)
    worst_s = max(check_end(*end) for end in ends[name])
    print(f"\n{name}: at most {worst_s:.2f} s after its last token, {len(ends[name])} runs")


def test_a_program_that_imports_loads_and_generates_in_a_thread_ends(checkpoint: Path) -> None:
    program = f"""
import threading
def work():
    import time
    import mlx.core as mx
    from arcee_mlx import Engine, GenerateOptions
    mx.set_default_device(mx.cpu)
    with Engine.load({str(checkpoint)!r}) as engine:
        engine.generate("a", GenerateOptions(max_tokens=5))
        print("last", time.time(), flush=True)
threading.Thread(target=work).start()
"""
    done = run(program, "", checkpoint, PATIENCE_S)
    check_end(done.returncode, done.stdout + done.stderr, time.time())
