"""run_tools: runs what a session's model calls, until it calls no more. No function runs but those the caller passed."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import InputError
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
            may run. Arguments become what their hints say: an Enum's member, a dataclass, a tuple.
        max_rounds: answers whose calls are run, at most.
        text: a user's message to begin with; None goes on from the calls of the session's last answer.
        options: instead of the session's; its tools are those given here. tool_choice is for the answer to `text`: those to
            results are free to call or not.
        approve: asked before each call; where it says False the function is not run.

    Returns:
        The first answer without calls; or, after max_rounds, the last, whose calls are `session.pending_tool_calls`.

    Raises:
        InputError: a tool is no function, or there is neither text nor a call to begin with.
        ArceeError: what `Session.send` and `Request.result` raise; the session is as after its last whole answer.
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
        results = [run_call(call, functions, approve) for call in calls]
        answer = _finish(session.send(results, free_to_call(options)))
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


def run_call(call: ToolCall, functions: Functions, approve: Approve | None = None) -> ToolResult:
    """Runs one call, if it may; what goes wrong in it is its result."""
    if (function := functions.get(call.name)) is None:
        return ToolResult(call.name, f"error: there is no tool {call.name!r}; there are {', '.join(functions)}")
    if approve is not None and not approve(call):
        return ToolResult(call.name, "error: the user does not want this call")
    try:
        hints = typing.get_type_hints(function)
        given = {
            name: read_type(hints[name], value) if name in hints else value for name, value in call.arguments.items()
        }
        value = function(**given)
        content = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except Exception as error:
        content = f"error: {type(error).__name__}: {error}"
    return ToolResult(call.name, content)
