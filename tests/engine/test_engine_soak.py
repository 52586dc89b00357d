"""Many callers at once, in every way there is, most of them unruly: nothing hangs, and every answer is the promised one."""

from __future__ import annotations

import asyncio
import faulthandler
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import (
    DEMO_MODEL,
    Answer,
    CallbackError,
    Engine,
    GenerateOptions,
    InputError,
    QueueFullError,
)
from arcee_mlx.engine import Request
from arcee_mlx.generate.answer import join_chunks

from engine_script import is_near_tie, settle
from process_memory import ProcessMemory, find_growth, measure_memory

THREADS, TASKS = 8, 6
STILL_S = 90.0  # so long without any request's end is a hang

BEGINNINGS = (
    "",
    "The old harbour was quiet that morning. The boats lay side by side, and nobody had come yet to look after them. ",
    "You are the keeper of a small museum and answer visitors in short sentences. Be kind, and never invent a date. ",
)
ENDS = (
    "Once upon a time",
    "The captain said",
    "In the garden there was",
    "She asked him",
    "It rained all day, and",
    "A",
)
PROMPTS = [beginning + end for beginning in BEGINNINGS for end in ENDS] + [
    "Grüße, 日本語 🙂",
    [7, 8, 9],
    [11],
    BEGINNINGS[1] * 5,
]
OPTIONS = (
    GenerateOptions(temp=0),
    GenerateOptions(temp=0, repetition_penalty=1.2, frequency_penalty=0.4, prefill_step_size=5),
    GenerateOptions(temp=0, logprobs=True, top_logprobs=3, logit_bias={20: 2.0}),
    GenerateOptions(temp=0.8, top_p=0.95, seed=1),
    GenerateOptions(temp=1.0, top_k=40, presence_penalty=0.5, seed=2, logprobs=True),
    GenerateOptions(temp=1.2, min_p=0.05, xtc_probability=0.3, seed=3),
    GenerateOptions(temp=0, kv_bits=8),
    GenerateOptions(temp=0.7, kv_bits=4, seed=4),
)
INVALID: list[tuple[Any, GenerateOptions]] = [
    ([10**6], GenerateOptions()),
    ([-1], GenerateOptions()),
    ([], GenerateOptions()),
    ("a", GenerateOptions(logit_bias={2 * 10**9: 1.0})),
    ("a", GenerateOptions(logprobs=True, top_logprobs=10**6)),
    ("a", GenerateOptions(kv_bits=8, kv_group_size=128)),
    ([5] * 3000, GenerateOptions()),
    ("a", GenerateOptions(temp=0, top_k=5)),
]
# Thirty of a hundred are cancelled, five are invalid, one has a processor that raises.
KINDS = (
    {"read": 44, "slow": 12, "deadline": 8, "invalid": 5, "raises": 1}
    | {"cancel_after": 12, "cancel_at_once": 6, "drop": 12}
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """One request: which of the pairs of prompt and options, how long, and what its caller does."""

    pair: int
    length: int
    kind: str
    place: int
    wait_s: float


@dataclass
class Soak:
    """The callers, and what they found."""

    engine: Engine
    pairs: Sequence[tuple[Any, GenerateOptions]]
    expected: Sequence[Answer]
    plans: queue.SimpleQueue[Plan]
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    parted: list[tuple[Plan, tuple[int, ...]]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, number: int = 1) -> None:
        with self.lock:
            self.counts[name] += number

    def given(self, plan: Plan) -> dict[str, Any]:
        """Arguments of the engine's methods."""
        prompt, options = INVALID[plan.place % len(INVALID)] if plan.kind == "invalid" else self.pairs[plan.pair]
        given: dict[str, Any] = {"prompt": prompt, "options": replace(options, max_tokens=plan.length)}
        if plan.kind == "deadline":
            given["deadline_s"] = plan.wait_s * 10
        if plan.kind == "raises":
            given["logits_processors"] = [raise_at(plan.place % plan.length)]
        return given

    def work(self) -> None:
        """A thread: one plan after the other."""
        try:
            while not self.over.is_set():
                self.serve(self.plans.get_nowait())
        except queue.Empty:
            pass
        except BaseException as error:
            self.problems.append(f"a caller saw {error!r}")

    def serve(self, plan: Plan) -> None:
        doors: dict[str, Callable[[Plan], None]] = {"invalid": self.ask, "read": self.ask, "raises": self.ask}
        while True:
            try:
                doors.get(plan.kind, self.read)(plan)
            except QueueFullError:
                self.add("queue full")
                self.over.wait(plan.wait_s * 5)
                continue
            except (InputError, CallbackError) as error:
                self.take_error(plan, error)
            return

    def ask(self, plan: Plan) -> None:
        """For the whole answer at once."""
        if plan.place % 2:
            self.take(plan, self.engine.generate(**self.given(plan)))
        else:
            self.take(plan, self.engine.submit(**self.given(plan)).result(STILL_S))

    def read(self, plan: Plan) -> None:
        """Piece by piece."""
        stream = self.engine.stream(**self.given(plan), buffer_chunks=1 if plan.kind == "slow" else 64)
        request, chunks = stream.request, []
        if plan.kind == "cancel_at_once":
            request.cancel()
        for chunk in stream:
            chunks.append(chunk)
            if plan.kind == "slow":
                self.over.wait(plan.wait_s)
            if len(chunks) > plan.place and plan.kind == "cancel_after":
                request.cancel()
            if len(chunks) > plan.place and plan.kind == "drop":
                break
        del stream
        answer = request.result(STILL_S)
        if plan.kind == "drop":
            assert answer.tokens[: len(chunks)] == tuple(chunk.token for chunk in chunks)
        else:
            self.check_stream(plan, chunks, answer)
        self.take(plan, answer)

    async def work_async(self) -> None:
        """An event loop: some tasks at a time."""

        async def work() -> None:
            while not self.over.is_set():
                try:
                    plan = self.plans.get_nowait()
                except queue.Empty:
                    return
                await self.serve_async(plan)

        try:
            await asyncio.gather(*(work() for _ in range(TASKS)))
        except BaseException as error:
            self.problems.append(f"the event loop saw {error!r}")

    async def serve_async(self, plan: Plan) -> None:
        while True:
            try:
                return await self.read_async(plan)
            except QueueFullError:
                self.add("queue full")
                await asyncio.sleep(plan.wait_s * 5)
            except (InputError, CallbackError) as error:
                return self.take_error(plan, error)

    async def read_async(self, plan: Plan) -> None:
        stream = self.engine.astream(**self.given(plan), buffer_chunks=1 if plan.kind == "slow" else 64)
        chunks: list[Any] = []

        async def read() -> None:
            async for chunk in stream:
                chunks.append(chunk)
                if plan.kind == "slow":
                    await asyncio.sleep(plan.wait_s)
                if len(chunks) > plan.place and plan.kind == "drop":
                    return

        task = asyncio.create_task(read())
        if plan.kind in ("cancel_after", "cancel_at_once"):  # the task is, wherever it is
            await asyncio.sleep(plan.wait_s * plan.place if plan.kind == "cancel_after" else 0)
            task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            self.add("cancelled tasks")
        request = stream.request
        stream = read = task = None  # type: ignore[assignment]
        if request is None:  # cancelled before it was one
            self.add("ended")
            return
        answer = await asyncio.to_thread(request.result, STILL_S)
        if plan.kind in ("drop", "cancel_after", "cancel_at_once"):
            assert answer.tokens[: len(chunks)] == tuple(chunk.token for chunk in chunks)
        else:
            self.check_stream(plan, chunks, answer)
        self.take(plan, answer)

    def check_stream(self, plan: Plan, chunks: Sequence[Any], answer: Answer) -> None:
        if "".join(c.text for c in chunks) != answer.text or tuple(c.token for c in chunks) != answer.tokens:
            self.problems.append(f"{plan}: the stream is not the answer")

    def take_error(self, plan: Plan, error: Exception) -> None:
        self.add(f"{plan.kind}: {type(error).__name__}")
        self.add("ended")
        wanted = {"invalid": InputError, "raises": CallbackError}.get(plan.kind)
        if type(error) is not wanted:
            self.problems.append(f"{plan}: {error!r}")

    def take(self, plan: Plan, answer: Answer) -> None:
        """Compares an answer with the single run's."""
        expected, count, reason = self.expected[plan.pair], len(answer.tokens), answer.stop_reason
        whole = expected.tokens[: plan.length]
        early = reason in ("cancelled", "deadline")
        tokenizer = self.engine.tokenizer
        text = tokenizer.decode(answer.tokens[:-1] if reason == "eos" else answer.tokens)
        ok = text.startswith(answer.text) if early else text == answer.text
        ok &= answer.stats.generation_tokens == count and len(answer.logprobs) in (0, count)
        ok &= early or count == plan.length or reason == "eos"
        ok &= not (early and plan.kind in ("read", "slow")) and plan.kind != "invalid"
        if plan.kind == "raises":  # it ended before that
            ok &= count <= plan.place % plan.length
        if not ok:
            self.problems.append(f"{plan}: {answer}")
        elif answer.tokens != (whole[:count] if early else whole):
            self.parted.append((plan, answer.tokens))
        self.add(f"{plan.kind}: {reason}")
        self.add("ended")
        self.add("tokens", count)


def raise_at(token: int) -> Callable[[mx.array, mx.array], mx.array]:
    calls = 0

    def process(_tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal calls
        calls += 1
        if calls > token:
            raise ValueError("on purpose")
        return logits

    return process


def make_plans(random_: random.Random, count: int, pairs: int, longest: int) -> list[Plan]:
    kinds = [kind for kind, share in KINDS.items() for _ in range(count * share // 100)]
    random_.shuffle(kinds)
    return [
        Plan(
            random_.randrange(pairs),
            random_.randint(1, longest),
            kind,
            random_.randrange(longest // 2),
            random_.uniform(0.0005, 0.01),
        )
        for kind in kinds
    ]


@pytest.mark.parametrize(
    ("count", "most_pairs", "longest"), [(100, 16, 12), pytest.param(2000, 160, 32, marks=pytest.mark.slow)]
)
def test_many_unruly_callers_get_what_was_promised(count: int, most_pairs: int, longest: int) -> None:
    loaded = arcee_mlx.load(DEMO_MODEL)
    random_ = random.Random(count)
    every = [(prompt, options) for prompt in PROMPTS for options in OPTIONS]
    pairs = random_.sample(every, most_pairs)
    expected = [
        join_chunks(list(arcee_mlx.stream_generate(*loaded, prompt, replace(options, max_tokens=longest))))
        for prompt, options in pairs
    ]
    plans: queue.SimpleQueue[Plan] = queue.SimpleQueue()
    for plan in make_plans(random_, count, most_pairs, longest):
        plans.put(plan)
    engine = Engine.load(DEMO_MODEL, max_batch_size=4, max_queue=6, prefill_step_size=64, prefix_cache_bytes=4 << 20)
    accepted: list[int] = []
    hand_over = engine._owner.submit

    def count_accepted(requests: list[Request]) -> None:
        hand_over(requests)
        accepted.append(len(requests))

    engine._owner.submit = count_accepted  # type: ignore[method-assign]
    soak = Soak(engine, pairs, expected, plans)
    threads = [threading.Thread(target=soak.work, daemon=True) for _ in range(THREADS)]
    threads.append(threading.Thread(target=lambda: asyncio.run(soak.work_async()), daemon=True))
    # Should even this test's own end hang.
    faulthandler.dump_traceback_later(3600, exit=True, file=sys.__stderr__)
    started_s = ended_s = time.monotonic()
    samples: list[tuple[float, ProcessMemory]] = []
    ended = 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        next((thread for thread in threads if thread.is_alive()), threads[0]).join(0.5)
        samples.append((time.monotonic() - started_s, measure_memory()))
        if soak.counts["ended"] > ended:
            ended, ended_s = soak.counts["ended"], time.monotonic()
        if time.monotonic() - ended_s > STILL_S:
            faulthandler.dump_traceback(all_threads=True, file=sys.__stderr__)
            soak.over.set()
            pytest.fail(f"it hangs after {ended} of {count} requests: {engine.stats()}; {dict(soak.counts)}")
    seconds = time.monotonic() - started_s
    settle(engine)  # what was cancelled last is seen by then
    stats = engine.stats()
    engine.close()
    ties = [
        (plan, tokens)
        for plan, tokens in soak.parted
        if is_near_tie(loaded, *pairs[plan.pair], tokens, expected[plan.pair].tokens)
    ]
    faulthandler.cancel_dump_traceback_later()
    growth = {
        name: find_growth([(second, getattr(memory, name)) for second, memory in samples])
        for name in ("needed", "resident", "kept")
    }
    print(
        f"\n{count} requests, {sum(accepted)} accepted, {stats.generated_tokens} tokens in {seconds:.0f} s, "
        f"{stats.generated_tokens / max(1, stats.decode_steps):.2f} a step; {len(ties)} near ties\nmemory at the end, "
        "growth over the last half: "
        + ", ".join(f"{name} {getattr(samples[-1][1], name) / 1e6:.0f} MB {growth[name]:+.2%}" for name in growth)
        + f"\n{dict(soak.counts)}\n{stats}"
    )
    assert not soak.problems
    assert len(ties) == len(soak.parted), [plan for plan in soak.parted if plan not in ties]
    assert soak.counts["ended"] == count and soak.counts["queue full"] > 0
    assert (stats.active, stats.queued) == (0, 0)
    assert stats.done + stats.failed == sum(accepted)
    assert stats.generated_tokens >= soak.counts["tokens"]
    assert count < 1000 or growth["needed"] < 0.01
