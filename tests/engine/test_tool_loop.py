"""Tools in a session: what was called and what it came to is part of the conversation, and nothing else ever runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest

from arcee_mlx import (
    DEMO_MODEL,
    Answer,
    AnswerStream,
    ContextOverflowError,
    Engine,
    GenerateOptions,
    InputError,
    Message,
    Session,
    ToolCall,
    ToolResult,
    run_tools,
)
from arcee_mlx.engine.tool_loop import run_calls
from arcee_mlx.engine.transcript import Draft, Turn

GREEDY = GenerateOptions(temp=0, max_tokens=80)


class Unit(Enum):
    METERS = "m"
    FEET = "ft"


@dataclass
class Point:
    x: int


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(DEMO_MODEL) as engine:
        yield engine


@pytest.fixture
def ran() -> list[Any]:
    return []


@pytest.fixture
def tools(ran: list[Any]) -> list[Any]:
    def measure(sea: Literal["Atlantic", "Pacific"], unit: Unit) -> dict[str, int]:
        """Measures a sea.

        Args:
            sea: Which.
            unit: Of the answer.
        """
        ran.append(("measure", sea, unit))
        return {"depth": 4000}

    def tell_time(zone: Literal["Ä", "UTC"]) -> str:
        """Tells the time.

        Args:
            zone: Where.
        """
        ran.append(("tell_time", zone))
        return "noon"

    return [measure, tell_time]


def finish(stream: AnswerStream) -> Answer:
    for _ in stream:
        pass
    return stream.request.result()


def make(tools: list[Any], choice: str = "required", **options: Any) -> GenerateOptions:
    return replace(GREEDY, tools=tuple(tools), tool_choice=choice, parallel_tool_calls=False, **options)


def test_calls_run_and_their_results_are_answered(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    session = engine.session("Be brief.")
    answer = run_tools(session, tools, text="How deep is the Pacific?", options=make(tools, "measure"))
    (call,) = [call for message in session.messages for call in message.tool_calls]
    assert ran == [("measure", call.arguments["sea"], Unit(call.arguments["unit"]))]
    system, asked, called, result, answered = session.messages
    assert (asked.role, called.role, called.content) == ("user", "assistant", "")
    assert result == Message("tool", '{"depth": 4000}', name="measure")
    assert answered == Message("assistant", answer.text) and answer.text and not session.pending_tool_calls
    # The model saw what the template writes, and of it only the new part was computed.
    rendered = engine.tokenizer.apply_chat_template(
        [message.for_template() for message in session.messages[:-1]], tools=tools, add_generation_prompt=True
    )
    assert session._transcript.text == rendered + answer.text
    new = f"<|im_end|>\n<|im_start|>tool\n<tool_response>\n{result.content}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert rendered.endswith(f"{call.text}{new}")
    computed = answer.stats.prompt_tokens - answer.stats.cached_tokens
    assert computed <= 1 + len(engine.tokenizer.encode(new, add_special_tokens=False))


def test_parallel_calls_are_answered_in_their_order(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    session = call_session(engine, tools, "tell_time", "measure")
    answer = run_tools(session, tools)
    assert [name for name, *_ in ran] == ["tell_time", "measure"]
    assert [message.role for message in session.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert session.messages[-1].content == answer.content


CALL = '<tool_call>\n{"name": "tell_time", "arguments": {"zone": "UTC"}}\n</tool_call>'
ARGUMENTS: dict[str, dict[str, Any]] = {"tell_time": {"zone": "UTC"}, "measure": {"sea": "Pacific", "unit": "ft"}}


def call_session(engine: Engine, tools: list[Any], *names: str, **options: Any) -> Session:
    """A session whose last answer calls tools of these names."""
    functions = [{"function": {"name": name, "arguments": json.dumps(ARGUMENTS.get(name, {}))}} for name in names]
    said: list[Any] = [
        {"role": "user", "content": "How deep?"},
        {"role": "assistant", "content": None, "tool_calls": functions},
    ]
    return engine.session(messages=said, options=make(tools, "auto", **options))


def test_only_what_was_passed_runs(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    session = call_session(engine, tools, "measure", "os.system", "tell_time")
    run_tools(session, tools[1:])
    assert ran == [("tell_time", "UTC")]
    assert [message.content for message in session.messages if message.role == "tool"] == [
        "error: there is no tool 'measure'; there are tell_time",
        "error: there is no tool 'os.system'; there are tell_time",
        "noon",
    ]


def test_what_is_not_approved_does_not_run(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    session, asked = call_session(engine, tools, "measure", "tell_time"), []

    def approve(call: ToolCall) -> bool:
        asked.append(str(call))
        return call.name == "tell_time"

    run_tools(session, tools, approve=approve)
    assert ran == [("tell_time", "UTC")] and asked == ["measure(sea='Pacific', unit='ft')", "tell_time(zone='UTC')"]
    assert "does not want" in session.messages[2].content


def test_what_goes_wrong_in_a_call_is_its_result() -> None:
    def go(to: Point, by: tuple, more: Any = None) -> object:  # type: ignore[type-arg]
        if more:
            raise RuntimeError("storm")
        return [to.x, by, {1, 2}]

    def run(arguments: dict[str, Any]) -> str:
        (result,) = run_calls([ToolCall("go", arguments)], {"go": go})
        return result.content

    assert run({"to": {"x": 3}, "by": [1, "é"]}) == '[3, [1, "é"], "{1, 2}"]'
    assert run({"to": {"x": 3}, "by": [], "more": 1}) == "error: RuntimeError: storm"
    assert run({"to": {"x": "3"}, "by": []}).startswith("error: ValueError")
    assert run({"by": []}).startswith("error: TypeError")
    assert run({"to": {"x": 3}, "by": [], "what": 1}).startswith("error: TypeError")


def test_a_result_that_is_no_json_is_told_as_it_prints() -> None:
    results: dict[str, Any] = {"circle": [], "keys": {(1, 2): 3}, "half": "a\ud800"}
    results["circle"].append(results["circle"])
    calls = [ToolCall(name, {}) for name in results]
    contents = [result.content for result in run_calls(calls, {name: lambda v=v: v for name, v in results.items()})]
    assert contents == ["[[...]]", "{(1, 2): 3}", "a?"]


def test_a_function_cannot_change_what_the_model_said(engine: Engine) -> None:
    def clear(items: list) -> str:  # type: ignore[type-arg]
        """Clears.

        Args:
            items: Which.
        """
        items.clear()
        return "done"

    functions = [{"function": {"name": "clear", "arguments": {"items": ["a"]}}}]
    said: list[Any] = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "", "tool_calls": functions}]
    session = engine.session(messages=said, options=GREEDY)
    run_tools(session, [clear])
    assert session.messages[1].tool_calls == (ToolCall("clear", {"items": ["a"]}),)


def test_all_calls_are_asked_about_before_any_runs(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    session = call_session(engine, tools, "tell_time", "measure")

    def approve(call: ToolCall) -> bool:
        if call.name == "measure":
            raise EOFError
        return True

    with pytest.raises(EOFError):
        run_tools(session, tools, approve=approve)
    assert ran == [] and len(session.pending_tool_calls) == 2


def test_results_that_do_not_fit_are_in_a_note_of_the_error(engine: Engine) -> None:
    def read() -> str:
        """Reads."""
        return "The sea is wide and deep. " * 600

    session = call_session(engine, [read], "read")
    with pytest.raises(ContextOverflowError) as caught:
        run_tools(session, [read])
    assert "wide and deep" in caught.value.__notes__[0] and session.pending_tool_calls


def test_calls_of_an_answer_that_was_cut_off_do_not_run(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    whole = ToolCall("tell_time", {"zone": "UTC"}, CALL)
    answer = finish(engine.session(options=GREEDY).send("Hi"))
    cut = replace(answer, text=f"{CALL}\n<tool_call>", tool_calls=(whole,), stop_reason="max_tokens")
    turn = Draft(Turn("Hi", ""), []).complete(engine.tokenizer, cut)
    assert turn.tool_calls == () and turn.answer == cut.text
    session = engine.session()
    answer = run_tools(session, tools, text="How deep?", options=make(tools, max_tokens=8))
    assert answer.is_complete is False and not ran and not session.pending_tool_calls


def test_results_told_in_another_order_go_by_their_ids(engine: Engine) -> None:
    def call(name: str, key: str | None) -> dict[str, Any]:
        return {"id": key, "type": "function", "function": {"name": name, "arguments": "{}"}}

    def tell(*results: dict[str, Any], ids: tuple[str | None, str | None] = ("1", "2")) -> Session:
        calls = [call("depth", ids[0]), call("time", ids[1])]
        said: list[Any] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": calls},
        ]
        return engine.session(messages=[*said, *results, {"role": "assistant", "content": "So."}])

    noon = {"role": "tool", "content": "noon", "tool_call_id": "2", "name": "time"}
    deep = {"role": "tool", "content": "4 km", "tool_call_id": "1"}
    for results in ((noon, deep), (deep, noon)):
        told = [message.for_template() for message in tell(*results).messages[1:4]]
        assert [call["id"] for call in told[0]["tool_calls"]] == ["1", "2"]
        assert told[1:] == [deep | {"name": "depth"}, noon]
    unnamed = [{"role": "tool", "content": text} for text in ("4 km", "noon")]
    assert [message.content for message in tell(*unnamed, ids=(None, None)).messages[2:4]] == ["4 km", "noon"]
    for wrong in ((deep | {"tool_call_id": "3"}, noon), (unnamed[0] | {"name": "time"}, unnamed[1]), (deep, deep)):
        with pytest.raises(InputError, match="one message of each call"):
            tell(*wrong)


def test_after_the_last_round_calls_are_left_pending(engine: Engine, tools: list[Any], ran: list[Any]) -> None:
    session = engine.session()
    answer = run_tools(session, tools, 0, text="How deep?", options=make(tools))
    assert answer.stop_reason == "tool_call" and session.pending_tool_calls == answer.tool_calls and not ran
    assert run_tools(session, tools, 1, options=make(tools)).tool_calls == () and len(ran) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "calls no tool; expected text"),
        ({"tools": [{"name": "x"}], "text": "x"}, "tool x is a JSON schema"),
        ({"max_rounds": -1, "text": "x"}, "max_rounds is -1"),
        ({"tools": [len], "text": "x"}, "tool len"),
    ],
)
def test_a_loop_that_cannot_begin_is_refused(
    engine: Engine, tools: list[Any], arguments: dict[str, Any], message: str
) -> None:
    session = engine.session(options=GREEDY)
    with pytest.raises(InputError, match=message):
        run_tools(session, **({"tools": tools} | arguments))
    assert session.messages == ()


def test_coroutines_are_refused(engine: Engine) -> None:
    async def sail() -> str:
        """Sails."""
        return ""

    with pytest.raises(InputError, match="sail is a coroutine function"):
        run_tools(engine.session(), [sail], text="x")


@pytest.mark.parametrize(
    "results", [[], [ToolResult("measure", "x")], [ToolResult("tell_time", "x")] * 2, ["noon"], b"x"]
)
def test_results_of_other_calls_are_refused(engine: Engine, tools: list[Any], results: Any) -> None:
    session = call_session(engine, tools, "tell_time")
    with pytest.raises(InputError, match="expected"):
        session.send(results)
    assert session.pending_tool_calls
    assert list(session.send([ToolResult("tell_time", "noon")])) and not session.pending_tool_calls


def test_a_saved_session_goes_on_with_its_pending_calls(engine: Engine, tools: list[Any], tmp_path: Path) -> None:
    session = engine.session(options=make(tools))
    called = finish(session.send("How deep?"))
    session.save(tmp_path / "s.safetensors")
    branch = session.branch()
    with Engine.load(DEMO_MODEL) as other:
        loaded = other.load_session(tmp_path / "s.safetensors")
        assert loaded.pending_tool_calls == called.tool_calls and loaded.messages == session.messages
        assert loaded.options == session.options
        answers = [run_tools(one, tools, options=make(tools)) for one in (session, loaded, branch)]
        loaded.save(tmp_path / "t.safetensors")
        assert other.load_session(tmp_path / "t.safetensors").messages == loaded.messages == session.messages
    assert len({answer.text for answer in answers}) == 1


def test_a_conversation_told_again_is_the_same_one(engine: Engine, tools: list[Any]) -> None:
    session = engine.session("Be brief.")
    run_tools(session, tools, text="How deep?", options=make(tools))
    finish(session.send("And the time?", make(tools, "auto")))
    again = engine.session(messages=session.messages)
    assert again.messages == session.messages
    told = [message.for_template() for message in session.messages]
    assert engine.session(messages=told).messages == session.messages
    answers = [finish(one.send("Why?", make(tools, "auto"))).text for one in (session, again)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("drop", [1, 2])
def test_messages_of_tools_without_their_calls_are_refused(engine: Engine, tools: list[Any], drop: int) -> None:
    session = engine.session()
    run_tools(session, tools, text="How deep?", options=make(tools))
    said = list(session.messages)
    del said[drop]
    with pytest.raises(InputError, match="expected user and assistant in turns"):
        engine.session(messages=said)


def test_regenerate_answers_the_same_results_and_rolling_back_takes_one_answer(
    engine: Engine, tools: list[Any]
) -> None:
    session = engine.session(options=make(tools))
    answer = run_tools(session, tools, text="How deep?", options=make(tools))
    assert "".join(chunk.text for chunk in session.regenerate(make(tools, "auto"))) == answer.text
    session.roll_back()
    assert session.pending_tool_calls and len(session.messages) == 2


def test_the_oldest_turns_go_with_the_results_of_their_calls(engine: Engine, tools: list[Any]) -> None:
    session = engine.session(options=make(tools, "auto", max_tokens=20), overflow="drop_oldest_turns")
    long = "The sea is wide and deep. " * 60
    for _ in range(6):
        run_tools(session, tools, text=long, options=make(tools, max_tokens=80))
        first = session.messages[[m.role for m in session.messages].index("user")]
        assert first.role == "user"
    dropped = session.dropped_turns
    assert dropped > 0
    assert dropped % 2 == 0  # each question has two: the call, and the answer to its result


def test_a_session_of_plain_turns_overflows_as_before(engine: Engine, tools: list[Any]) -> None:
    session = engine.session(options=make(tools, "auto", max_tokens=4))
    with pytest.raises(ContextOverflowError, match="send less$"):
        session.send("The sea is wide and deep. " * 600)
