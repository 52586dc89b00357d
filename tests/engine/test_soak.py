"""Many callers at once for long: no hang, no token lost or doubled, every answer the promised one, no memory that grows."""

from __future__ import annotations

import asyncio
import faulthandler
import random
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import (
    Answer,
    CallbackError,
    Engine,
    GenerateOptions,
    GenerationChunk,
    InputError,
    QueueFullError,
    Request,
)

from engine_data import OPTIONS, PROMPTS, Loaded, alone, is_promised, settle

THREADS, TASKS = 8, 4
KINDS = {"whole": 0.49, "slow": 0.10, "cancelled": 0.30, "invalid": 0.05, "deadline": 0.05, "raising": 0.01}
INVALID: list[tuple[Any, dict[str, Any]]] = [
    ("", {}),
    ([400], {}),
    ("a", {"logit_bias": {999: 1.0}}),
    ("a", {"kv_bits": 8}),
]


def bad_processor(_tokens: Any, _logits: Any) -> Any:
    raise RuntimeError("planted")


@dataclass
class Soak:
    """One engine, its callers, and what became of their requests."""

    loaded: Loaded
    engine: Engine
    total: int
    jobs: list[tuple[Any, GenerateOptions]] = field(default_factory=list)
    expected: list[Answer] = field(default_factory=list)
    ends: Counter[str] = field(default_factory=Counter)
    submitted: int = 0
    begun: int = 0
    tokens: int = 0
    near_ties: int = 0
    rss: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self) -> None:
        """Distinct requests and their answers, made one by one."""
        draw = random.Random(0)
        for i, (name, options) in enumerate(OPTIONS.items()):
            for prompt in PROMPTS[i % 2 :: 3]:
                values = {**vars(options), "max_tokens": draw.choice([1, 3, 8, 20, 40])}
                self.jobs.append((prompt, GenerateOptions(**values)))
                self.expected.append(alone(self.loaded, *self.jobs[-1]))
                assert name

    def next_draw(self) -> random.Random | None:
        """Of the next request, so that the requests are the same whoever makes them; None when all are made."""
        with self.lock:
            if self.begun == self.total:
                return None
            self.begun += 1
            if self.begun % max(1, self.total // 100) == 0:
                self.rss.append(resident_bytes())
            return random.Random(self.begun)

    def count(self, end: str, tokens: int = 0) -> None:
        with self.lock:
            self.ends[end] += 1
            self.tokens += tokens

    def accepted(self) -> None:
        with self.lock:
            self.submitted += 1

    def plan(self, draw: random.Random) -> tuple[str, int, dict[str, Any]]:
        """(kind, job, arguments)."""
        kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
        arguments: dict[str, Any] = {"buffer_chunks": draw.choice([1, 2, 64])}
        if kind == "slow":
            arguments["buffer_chunks"] = 1
        if kind == "cancelled":
            arguments["buffer_chunks"] = 2  # or it would be whole before it is cancelled
        if kind == "deadline":
            arguments["deadline_s"] = draw.choice([0.001, 0.01, 0.1])
        if kind == "raising":
            arguments["logits_processors"] = [bad_processor]
        return kind, draw.randrange(len(self.jobs)), arguments

    def refuse_invalid(self, draw: random.Random) -> None:
        prompt, options = draw.choice(INVALID)
        with pytest.raises(InputError):
            self.engine.submit(prompt, GenerateOptions(**options))
        self.count("invalid")

    def check(self, kind: str, job: int, request: Request, chunks: list[GenerationChunk] | None) -> None:
        """Of one that ended: what was streamed is the result, and the result is the promised one, or its beginning."""
        self.accepted()
        try:
            answer = request.result(0)
        except CallbackError:
            assert kind == "raising"
            self.count("raising")
            return
        if chunks is not None:
            assert tuple(chunk.token for chunk in chunks) == answer.tokens
            assert "".join(chunk.text for chunk in chunks) == answer.text
        expected = self.expected[job]
        if answer.stop_reason in ("cancelled", "deadline"):
            assert kind == answer.stop_reason
            if answer.tokens != expected.tokens[: len(answer.tokens)]:
                self.near_ties += not is_promised(self.loaded, *self.jobs[job], answer, expected)
            self.count(kind, len(answer.tokens))
            return
        assert kind != "raising"
        self.near_ties += not is_promised(self.loaded, *self.jobs[job], answer, expected)
        self.count("whole", len(answer.tokens))

    # Callers in threads.

    def call(self) -> None:
        while draw := self.next_draw():
            kind, job, arguments = self.plan(draw)
            if kind == "invalid":
                self.refuse_invalid(draw)
                continue
            while True:
                try:
                    self.call_once(kind, job, arguments, draw)
                    break
                except QueueFullError:
                    self.count("refused by a full queue")

    def call_once(self, kind: str, job: int, arguments: dict[str, Any], draw: random.Random) -> None:
        prompt, options = self.jobs[job]
        if kind == "whole" and draw.random() < 0.5:
            request = self.engine.submit(prompt, options)
            request.result()
            return self.check(kind, job, request, None)
        stream = self.engine.stream(prompt, options, **arguments)
        request, chunks = stream.request, []
        read = draw.randrange(len(self.expected[job].tokens)) if kind == "cancelled" else None
        try:
            while read is None or len(chunks) < read:
                chunks.append(next(stream))
        except (StopIteration, CallbackError):
            pass
        if kind != "cancelled":
            return self.check(kind, job, request, None if kind in ("raising", "deadline") else chunks)
        way = draw.randrange(3)
        if way == 0:
            request.cancel()
            chunks += list(stream)
            request.result()
            return self.check(kind, job, request, chunks)
        if way == 1:
            stream.close()
        del stream
        request.result()
        return self.check(kind, job, request, None)

    # Callers in an event loop.

    async def acall(self) -> None:
        while draw := self.next_draw():
            kind, job, arguments = self.plan(draw)
            if kind == "invalid":
                self.refuse_invalid(draw)
                continue
            while True:
                try:
                    await self.acall_once(kind, job, arguments, draw)
                    break
                except QueueFullError:
                    self.count("refused by a full queue")
                    await asyncio.sleep(0)

    async def acall_once(self, kind: str, job: int, arguments: dict[str, Any], draw: random.Random) -> None:
        stream = self.engine.astream(*self.jobs[job], **arguments)
        chunks: list[GenerationChunk] = []

        async def read() -> None:
            async for chunk in stream:
                chunks.append(chunk)
                if kind == "slow":
                    await asyncio.sleep(0)

        if kind != "cancelled":
            try:
                await read()
            except CallbackError:
                chunks.clear()
        else:
            task, count = asyncio.create_task(read()), draw.randrange(len(self.expected[job].tokens))
            while not task.done() and len(chunks) < count:
                await asyncio.sleep(0)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                if stream.request is None:  # it was cancelled as it was submitted
                    self.count("cancelled unsubmitted")
                    return
        request = stream.request
        assert request is not None
        while not request.has_ended:
            await asyncio.sleep(0)
        self.check(kind, job, request, chunks if kind in ("whole", "slow") else None)

    async def run_tasks(self) -> None:
        await asyncio.gather(*(self.acall() for _ in range(TASKS)))

    def run(self) -> None:
        failures: list[BaseException] = []

        def guarded(work: Any) -> None:
            try:
                work()
            except BaseException as error:
                failures.append(error)

        works = [self.call] * THREADS + [lambda: asyncio.run(self.run_tasks())]
        threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


def resident_bytes() -> int:
    if sys.platform == "linux":
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def soak(checkpoint: Path, total: int, timeout_s: int) -> Soak:
    faulthandler.dump_traceback_later(timeout_s, exit=True)  # what hangs is shown
    try:
        with Engine.load(checkpoint, max_queue=6, prefix_cache_bytes=2_000_000) as engine:
            run = Soak(arcee_mlx.load(checkpoint), engine, total)
            run.prepare()
            run.run()
            settle(engine)
            while engine.stats().active:  # one cancelled as it was submitted is on its way out
                settle(engine)
            stats = engine.stats()
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"\n{total} requests: {dict(run.ends)}; {run.near_ties} near ties; {run.tokens} tokens checked, {stats.generated_tokens} made in "
          f"{stats.decode_steps} steps, {stats.computed_prompt_tokens} of {stats.prompt_tokens} prompt tokens computed")  # fmt: skip
    assert (stats.active, stats.queued) == (0, 0)
    lost = run.ends["cancelled unsubmitted"]  # some of these came to be submitted, and were cancelled then
    assert run.submitted <= stats.done + stats.failed <= run.submitted + lost
    assert stats.failed == run.ends["raising"]
    assert sum(number for end, number in run.ends.items() if end != "refused by a full queue") == total
    assert stats.prefix_cache_bytes <= 2_000_000
    return run


def test_short_soak(checkpoint: Path) -> None:
    run = soak(checkpoint, 120, 300)
    assert run.ends["whole"] > 40 and run.ends["cancelled"] > 10 and run.ends["invalid"] > 1


@pytest.mark.slow
def test_long_soak(checkpoint: Path) -> None:
    run = soak(checkpoint, 2000, 3000)
    half = np.array(run.rss[len(run.rss) // 2 :], dtype=float)
    slope = np.polyfit(np.arange(len(half)), half, 1)[0] * len(half) / half.mean()
    print(f"resident memory {half.mean() / 1e6:.0f} MB, growing by {100 * slope:.2f} % over the last half")
    assert slope < 0.01
    assert run.ends["raising"] > 5 and run.ends["deadline"] > 20
