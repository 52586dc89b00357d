"""Programs with an engine end as they would without one: with their own status, at once, whatever is being computed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BEGINNING = """
import asyncio, os, sys, threading
import arcee_mlx
from arcee_mlx import Engine, EngineClosedError, GenerateOptions
PATH = sys.argv[1]
SHORT = GenerateOptions(max_tokens=8, temp=0)
LONG = GenerateOptions(max_tokens=200, temp=0, logit_bias={1: -100, 3: -100})
"""
STARTED = """
begun = threading.Event()
def hold(tokens, logits):
    begun.set()
    return logits
engine = Engine.load(PATH)
"""
# What of it lives at the end of a program.
PARTS = {
    "idle": "idle = engine",
    "running": "running = engine.submit('a', LONG, logits_processors=[hold]); begun.wait()",
    "paused": "stream = engine.stream('a', LONG, buffer_chunks=2); next(stream)",
    "dropped": """
other = Engine.load(PATH)
forgotten = other.submit('a', LONG, logits_processors=[hold])
begun.wait()
del other
""",
    # It waits for an answer that never comes, since nobody reads the stream.
    "blocked thread": """
unread, waits = engine.stream('a', LONG, buffer_chunks=2), threading.Event()
def wait():
    waits.set()
    try:
        unread.request.result()
    except EngineClosedError:
        pass
threading.Thread(target=wait, daemon=True).start()
waits.wait()
""",
    "event loop": """
async def app():
    stream = engine.astream('a', LONG, buffer_chunks=2)
    await anext(stream)
    return stream
astream = asyncio.run(app())
""",
}
FORK = """
session, request = engine.session(), engine.submit('a', SHORT)
request.result()
sys.stdout.flush()
child = os.fork()
if child == 0:
    closed = []
    for call in (lambda: engine.generate('a'), lambda: engine.stream('a'), lambda: engine.astream('a'), engine.stats,
                 engine.session, lambda: engine.load_session('x.safetensors'), request.result,
                 lambda: session.send('a'), lambda: session.asend('a')):
        try:
            call()
        except EngineClosedError:
            closed.append(call)
    engine.close()
    sys.exit(len(closed) * engine.is_closed)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(status, len(engine.generate('a', SHORT).tokens))
"""
# Streams that the parent asked for, first read in a child that its loop forked, and in one with a loop of its own.
FORK_STREAMS = """
session = engine.session()
streams = [make("a") for make in (engine.astream, session.asend) for _ in range(2)]
begun = engine.astream("a", LONG, buffer_chunks=2)
async def read(stream):
    try:
        await anext(stream)
    except Exception as error:
        return type(error) is EngineClosedError
    return 0
def wait(child):
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ", flush=True)
async def app():
    await anext(begun)
    child = os.fork()
    if child == 0:  # it closes no loop, which is its parent's, too
        os._exit(await read(streams[0]) + await read(streams[2]) + await read(begun) + await read(begun))
    wait(child)
    print(int(await read(streams[0])), end=" ", flush=True)
asyncio.run(app())
child = os.fork()
if child == 0:
    sys.exit(asyncio.run(read(streams[1])) + asyncio.run(read(streams[3])))
wait(child)
"""
ON_A_THREAD = {
    "engine": """
def work():
    global engine
    engine = Engine.load(PATH)
    print(len(engine.generate("a", SHORT).tokens))
""",
    "generate": """
def work():
    model, tokenizer = arcee_mlx.load(PATH)
    print(len(list(arcee_mlx.stream_generate(model, tokenizer, "a", SHORT))))
""",
}
RUN = """
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""


def start(script: str, checkpoint: Path) -> subprocess.Popen[str]:
    root = str(Path(__file__).parent.parent.parent)
    environment = os.environ | {"PYTHONPATH": root}
    command = [sys.executable, "-c", BEGINNING + script, str(checkpoint)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit status, output and errors of a program that must not hang."""
    try:
        output, errors = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        pytest.fail("the program hangs")
    return process.returncode, output.strip(), errors


def test_a_program_ends_whatever_its_engine_is_doing(checkpoint: Path) -> None:
    assert finish(start(STARTED + "\n".join(PARTS.values()), checkpoint)) == (0, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_program_ends_with_this_alone(checkpoint: Path, part: str) -> None:
    assert finish(start(STARTED + PARTS[part], checkpoint)) == (0, "", "")


def test_a_program_keeps_its_status_and_its_threads_get_their_answers(checkpoint: Path) -> None:
    script = PARTS["running"] + "\n" + "threading.Thread(target=lambda: print(len(running.result().tokens))).start()"
    assert finish(start(STARTED + script + "; sys.exit(3)", checkpoint)) == (3, "200", "")


def test_a_forked_process_has_no_engine_and_leaves_its_parents_alone(checkpoint: Path) -> None:
    assert finish(start(STARTED + FORK, checkpoint)) == (0, "9 8", "")


def test_an_async_stream_first_read_in_a_forked_process_says_so(checkpoint: Path) -> None:
    assert finish(start(STARTED + FORK_STREAMS, checkpoint)) == (0, "4 0 2", "")


@pytest.mark.parametrize("runs", [3, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ON_A_THREAD)
def test_a_program_that_computes_on_a_thread_ends_well(checkpoint: Path, kind: str, runs: int) -> None:
    done = 0
    while done < runs:
        together = [start(ON_A_THREAD[kind] + RUN, checkpoint) for _ in range(min(3, runs - done))]
        assert [finish(process) for process in together] == [(0, "8", "")] * len(together)
        done += len(together)
