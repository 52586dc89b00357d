"""Sessions: one answer at a time, what fails or is refused changes nothing, what is cut off is kept, a full context."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import (
    ArceeForCausalLM,
    CallbackError,
    ContextOverflowError,
    Engine,
    EngineClosedError,
    GenerateOptions,
    InputError,
    MemoryBudgetError,
    Message,
    QueueFullError,
    Tokenizer,
    TokenizerError,
)

from session_script import GREEDY, SEEDED, Script, contents, read, render, send_all

Loaded = tuple[ArceeForCausalLM, Tokenizer]


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def test_a_session_makes_one_answer_at_a_time(engine: Engine) -> None:
    session = engine.session(options=GREEDY)
    gate = threading.Event()

    def wait(_: mx.array, logits: mx.array) -> mx.array:
        gate.wait(30)
        return logits

    results: list[object] = []
    ready = threading.Barrier(6)

    def send(i: int) -> None:
        ready.wait()
        try:
            results.append(session.send(f"Number {i}?", logits_processors=[wait]))
        except InputError as error:
            results.append(error)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for refused in (lambda: session.roll_back(0), session.regenerate, lambda: session.edit(0, "x")):
        with pytest.raises(InputError, match="is making an answer"):
            refused()
    assert session.messages == ()
    gate.set()
    errors = [str(result) for result in results if isinstance(result, InputError)]
    assert len(errors) == 5 and all("expected one at a time" in error for error in errors)
    (stream,) = [result for result in results if not isinstance(result, InputError)]
    assert isinstance(stream, arcee_mlx.AnswerStream)
    assert read(stream) and len(session.messages) == 2
    session.roll_back()


def test_an_answer_nobody_reads_is_part_of_the_session(engine: Engine) -> None:
    session = engine.session(options=GREEDY)
    stream = session.send("One?")
    answer = stream.request.result()
    assert contents(session) == ["One?", answer.text]


def test_of_an_answer_cut_off_what_was_made_is_kept(engine: Engine, loaded: Loaded) -> None:
    long = GenerateOptions(max_tokens=150, temp=0)
    session = engine.session(options=GREEDY)
    for cut in ("cancel", "deadline", "drop"):
        stream = session.send("Go on?", long, logits_processors=[Script(*[80] * 150)], buffer_chunks=4)
        text = next(stream).text + next(stream).text + next(stream).text
        request = stream.request
        if cut == "deadline":
            request.deadline_s = time.monotonic()
            text += "".join(chunk.text for chunk in stream)
        elif cut == "cancel":
            stream.close()
        del stream
        made = request.result()
        assert made.stop_reason == {"cancel": "cancelled", "deadline": "deadline", "drop": "cancelled"}[cut]
        assert session.messages[-1].content == made.text and made.text.startswith(text)
        assert 3 <= len(made.tokens) <= 8
    said, script = render(loaded[1], session, "So?"), Script()
    *_, chunk = session.send("So?", logits_processors=[script])
    assert loaded[1].decode(script.prompt) == said
    assert chunk.stats.cached_tokens == request.prompt_tokens + len(made.tokens)


def test_who_goes_on_right_after_a_cancel_is_not_refused(engine: Engine) -> None:
    session = engine.session(options=GREEDY)
    for _ in range(5):
        stream = session.send("Go on?", GenerateOptions(max_tokens=100))
        next(stream)
        stream.close()
        session.roll_back()
    assert session.messages == ()


def test_an_answer_that_never_began_leaves_the_session_as_it_was(engine: Engine) -> None:
    session = engine.session(options=GREEDY)
    send_all(session, "One?")
    before = session.messages
    for begin in (lambda: session.send("Two?", deadline_s=1e-9), lambda: session.regenerate(deadline_s=1e-9)):
        assert begin().request.result().stop_reason == "deadline"
        assert session.messages == before


def test_what_fails_leaves_the_session_as_it_was(engine: Engine, checkpoint: Path) -> None:
    def fail(*_: mx.array) -> mx.array:
        raise ValueError("on purpose")

    session = engine.session(options=GREEDY)
    one, two = send_all(session, "One?", "Two?")
    before = session.messages
    for begin in (
        lambda: session.send("x", logits_processors=[fail]),
        lambda: session.regenerate(logits_processors=[fail]),
        lambda: session.edit(0, "x", logits_processors=[fail]),
    ):
        with pytest.raises(CallbackError, match="on purpose"):
            list(begin())
        assert session.messages == before
    for refused in (
        lambda: session.send(3),  # type: ignore[arg-type]
        lambda: session.send("x", GenerateOptions(logit_bias={400: 1.0})),
        lambda: session.send("x", deadline_s=-1),
        lambda: session.send("x", buffer_chunks=0),
        lambda: session.send("half \ud800"),
        lambda: session.edit(2, "x"),
        lambda: session.edit(-1, "x"),
        lambda: session.roll_back(3),
        lambda: session.roll_back(-1),
    ):
        with pytest.raises(InputError):
            refused()
        assert session.messages == before
    assert read(session.regenerate()) == two

    with Engine.load(checkpoint, max_batch_size=1, max_queue=0) as small:
        full = small.session(options=GREEDY)
        send_all(full, "One?")
        before = full.messages
        with small.stream("x", GenerateOptions(max_tokens=200), buffer_chunks=1), pytest.raises(QueueFullError):
            full.send("Two?")
        assert full.messages == before
    with pytest.raises(EngineClosedError):
        full.send("Two?")
    assert full.messages == before


def test_a_session_without_an_answer_has_none_to_make_anew(engine: Engine) -> None:
    with pytest.raises(InputError, match="has no answer yet"):
        engine.session().regenerate()


def test_the_budget_refuses_what_does_not_fit_and_the_session_stays(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        needed = engine.stats().predicted_bytes
    with Engine.load(checkpoint, memory_budget_bytes=needed + 300_000) as engine:
        session = engine.session()
        with pytest.raises(MemoryBudgetError):
            session.send("One?", GenerateOptions(max_tokens=-1))
        assert session.messages == ()


def test_a_full_context_is_refused_with_the_numbers(engine: Engine, loaded: Loaded) -> None:
    session = engine.session("Be brief.", options=GenerateOptions(max_tokens=20, temp=0))
    with pytest.raises(ContextOverflowError) as caught:
        for i in range(20):
            before = session.messages
            list(session.send(f"Tell me of the watery part of the world, {i}?"))
    assert session.messages == before and len(before) > 4
    assert "expected at most 255 of the model's 256 positions, and 236 to leave 20" in str(caught.value)
    session.roll_back()
    assert send_all(session, "x")


def test_the_oldest_turns_are_dropped_where_that_is_the_policy(engine: Engine, loaded: Loaded) -> None:
    tokenizer = loaded[1]
    session = engine.session("Be brief.", options=GenerateOptions(max_tokens=20, temp=0), overflow="drop_oldest_turns")
    dropped, computed = [], []
    for i in range(16):
        question, script = f"Tell me of the part of the world, {i}?", Script()
        said = session.messages
        *_, chunk = session.send(question, logits_processors=[script])
        assert chunk.stop_reason != "context_full"
        seen = [said[0], *said[1 + 2 * session.dropped_turns :], Message("user", question)]
        text = tokenizer.apply_chat_template([vars(message) for message in seen], add_generation_prompt=True)
        assert tokenizer.decode(script.prompt) == text
        dropped.append(session.dropped_turns)
        computed.append(chunk.stats.prompt_tokens - chunk.stats.cached_tokens)
    assert len(session.messages) == 33 and session.messages[1].content == "Tell me of the part of the world, 0?"
    assert dropped == sorted(dropped) and dropped[-1] > 3
    # They go several at a time: with most messages only the new tokens are computed.
    assert sum(count < 40 for count in computed) > 9 > len(set(dropped)) > 2
    session.roll_back(14)
    assert session.dropped_turns == 0
    with pytest.raises(ContextOverflowError, match="; send less$"):
        session.send("Call me Ishmael. " * 60)


@pytest.mark.parametrize(
    "arguments",
    [
        {"messages": [Message("user", "x")]},
        {"messages": [Message("assistant", "x"), Message("user", "x")]},
        {"messages": [Message("user", "x"), Message("assistant", "x"), Message("system", "x")]},
        {"messages": ["x"]},
        {"messages": [{"role": "user", "content": ["x"]}, Message("assistant", "x")]},
        {"messages": [{"role": "user", "content": "x", "name": "y"}, Message("assistant", "x")]},
        {"system_prompt": "x", "messages": [Message("system", "x")]},
        {"system_prompt": 3},
        {"overflow": "forget"},
        {"options": {"temp": 0}},
    ],
)
def test_what_is_no_conversation_is_refused(engine: Engine, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected"):
        engine.session(**arguments)


def test_a_checkpoint_without_a_chat_template_has_no_sessions(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with Engine.load(folder) as engine, pytest.raises(TokenizerError, match="plain text with Engine.stream"):
        engine.session()


def test_asend_answers_as_send_does_and_keeps_what_a_cancelled_task_had(engine: Engine) -> None:
    expected = send_all(engine.session(options=SEEDED), "One?", "Two?")
    session = engine.session(options=SEEDED)

    async def talk() -> list[list[int]]:
        made = [[chunk.token async for chunk in session.asend(text)] for text in ("One?", "Two?")]
        stream = session.asend("Three?", GenerateOptions(max_tokens=150), buffer_chunks=2)
        await anext(stream)
        second = session.asend("Meanwhile?")
        with pytest.raises(InputError, match="is making an answer"):
            await anext(second)
        await stream.aclose()
        assert [chunk.token async for chunk in session.asend("Four?")]
        return made

    assert asyncio.run(talk()) == expected
    assert contents(session)[::2] == ["One?", "Two?", "Three?", "Four?"]
