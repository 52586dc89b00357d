"""run_tools: runs what a session's model calls, until it calls no more. No function runs but those the caller passed."""

from __future__ import annotations

import copy
import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ArceeError, InputError
from ..generate.answer import Answer
from ..generate.options import GenerateOptions
from ..generate.tools import ToolCall, ToolResult, name_tools, read_tools
from ..generate.typed_json import read_type
from .answer_stream import AnswerStream
from .session import Session

Approve = Callable[[ToolCall], bool]
Functions = Mapping[str, Callable[..., Any]]


def run_tools(
    session: Session,
    tools: Sequence[Callable[..., Any]],
    max_rounds: int = 8,
    *,
    text: str | None = None,
    options: GenerateOptions | None = None,
    approve: Approve | None = None,
) -> Answer:
    """Runs the calls in a session's answers and sends what they come to, until an answer calls nothing.

        answer = run_tools(session, [look_up, add], text="How old was Melville when he wrote it?")

    Functions run in the calling thread, one after the other; from asyncio, `await asyncio.to_thread(run_tools, ...)`. What one
    returns goes to the model as text, or as JSON; what it raises, a call that is not approved, and arguments that do not
    fit, as a text that begins with "error:".

    Args:
        tools: functions with type hints and a docstring (see `get_json_schema`): what the model is told of, and all that
            may run. Arguments become what their hints say: an Enum's member, a tuple.
        max_rounds: answers whose calls are run, at most.
        text: a user's message to begin with; None goes on from the calls of the session's last answer.
        options: instead of the session's; its tools are those given here. tool_choice is for the answer to `text`: those to
            results are free to call or not.
        approve: asked of each call, of all in an answer before any of them runs; where it says False it does not run.

    Returns:
        The first answer without calls, or that was cut off; or, after max_rounds, the last, whose calls are
        `session.pending_tool_calls`.

    Raises:
        InputError: a tool is no function, there is neither text nor a call to begin with, or an option does not go with
            tools; see `GenerateOptions`.
        ArceeError: what `Session.send` and `Request.result` raise, results too long for the context among it. The calls
            of the last whole answer are then pending, though their functions may have run: called again, this runs them
            again. A note of the error has their results.
    """
    functions = read_functions(tools)
    if type(max_rounds) is not int or max_rounds < 0:
        raise InputError(f"max_rounds is {max_rounds!r}; expected an integer of at least 0")
    options = replace(options or session.options or GenerateOptions(), tools=read_tools(tools))
    answer = None if text is None else _finish(session.send(text, options))
    if answer is None and not session.pending_tool_calls:
        raise InputError("the session's last answer calls no tool; expected text to begin with; give it as text=")
    for _ in range(max_rounds):
        if not (calls := session.pending_tool_calls):
            break
        results = run_calls(calls, functions, approve)
        try:
            answer = _finish(session.send(results, free_to_call(options)))
        except ArceeError as error:
            error.add_note(f"The functions have run: {results}")
            raise
    if answer is None:
        raise InputError("max_rounds is 0 without text; expected at least 1 round for the calls of the last answer")
    return answer


def _finish(stream: AnswerStream) -> Answer:
    for _ in stream:
        pass
    return stream.request.result()


def free_to_call(options: GenerateOptions) -> GenerateOptions:
    """Options for the answer to results: a model that had to call again would never end."""
    return options if options.tool_choice == "none" else replace(options, tool_choice="auto")


def read_functions(tools: Sequence[Callable[..., Any]]) -> Functions:
    """Functions by the names that a model calls them by.

    Raises:
        InputError: one is no function that can be called from here, or cannot be described; see `read_tools`.
    """
    described = read_tools(tools)
    for tool, name in zip(tools, name_tools(described), strict=True):
        if not callable(tool):
            raise InputError(f"tool {name} is a JSON schema; expected a function, which can be run")
        if inspect.iscoroutinefunction(tool):
            raise InputError(f"tool {name} is a coroutine function; expected a plain one; have it run the coroutine")
    return dict(zip(name_tools(described), tools, strict=True))


def run_calls(calls: Sequence[ToolCall], functions: Functions, approve: Approve | None = None) -> list[ToolResult]:
    """Asks of all calls, then runs those that may, in their order; what goes wrong in one is its result."""
    known = [call.name in functions for call in calls]
    allowed = [is_known and (approve is None or approve(call)) for call, is_known in zip(calls, known, strict=True)]
    results = []
    for call, is_known, is_allowed in zip(calls, known, allowed, strict=True):
        if is_allowed:
            content = _run(functions[call.name], call.arguments)
        elif is_known:
            content = "error: the user does not want this call"
        else:
            content = f"error: there is no tool {call.name!r}; there are {', '.join(functions)}"
        results.append(ToolResult(call.name, content, call.id))
    return results


def _run(function: Callable[..., Any], arguments: Mapping[str, Any]) -> str:
    try:
        hints = typing.get_type_hints(function)
        own = copy.deepcopy(dict(arguments))  # what a function does to them is not what the model said
        given = {name: read_type(hints[name], value) if name in hints else value for name, value in own.items()}
        value = function(**given)
    except Exception as error:
        return _write(f"error: {type(error).__name__}: {error}")
    return _write(value)


def _write(value: Any) -> str:
    """A result as text that can be encoded; it never fails, the function having run."""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that JSON has not, or a circle
        text = repr(value)
    return text.encode("utf-8", "replace").decode("utf-8")
