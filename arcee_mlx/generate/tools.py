"""Tools: functions a model may call. What it is told of them, and its calls read back from what it wrote.

A call is text in a form that the checkpoint's chat template teaches; the parsers of those forms are mlx-lm's. Nothing here
runs a function: see `run_tools`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from ..checkpoint.chat_template import Tool
from ..checkpoint.function_schema import get_json_schema
from ..checkpoint.tokenizer import Tokenizer
from ..errors import GrammarError, InputError
from ..upstream import mlx_lm_module
from .json_schema import STRICT_JSON, make_parameters_schema

TOOL_CHOICES = ("auto", "none", "required")
# Hermes' form, which Qwen and most ChatML models share: {"name": ..., "arguments": ...} between <tool_call> and </tool_call>.
_HERMES = "json_tools"
_JSON_OPTIONS = STRICT_JSON | {"item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        name: of the tool.
        arguments: by name.
        text: as the model wrote it.
        id: of a call from a conversation that was told; None for the model's, whose results go by their order.
    """

    name: str
    arguments: Mapping[str, Any] = field(hash=False)
    text: str = field(default="", compare=False, repr=False)
    id: str | None = None

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


@dataclass(frozen=True)
class InvalidToolCall:
    """What begins like a call and is none.

    Attributes:
        text: as the model wrote it.
        error: what is wrong with it.
    """

    text: str
    error: str


@dataclass(frozen=True)
class ToolResult:
    """What a call came to, for the model to go on with.

    Attributes:
        name: of the tool.
        content: text; of other values usually their JSON.
        tool_call_id: of the call, where that has an id.
    """

    name: str
    content: str
    tool_call_id: str | None = None


def read_tools(tools: Iterable[Tool]) -> tuple[dict[str, Any], ...]:
    """Tools in the form that chat templates read: `{"type": "function", "function": {name, description, parameters}}`.

    Args:
        tools: functions (see `get_json_schema`), or such mappings, or the inner mapping of one.

    Raises:
        InputError: one is neither, or two have the same name.
    """
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Iterable):
        raise InputError(f"tools is of type {type(tools).__name__}; expected a list of functions or JSON schemas")
    read = tuple(_read_tool(i, tool) for i, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in read]
    for name in names:
        if name in TOOL_CHOICES or names.count(name) > 1:
            reason = "a word of tool_choice" if name in TOOL_CHOICES else "the name of two"
            raise InputError(f"tools: {name!r} is {reason}; expected names that tell them apart; rename it")
    return read


def _read_tool(place: int, tool: Tool) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        if not callable(tool):
            raise InputError(f"tools[{place}] is of type {type(tool).__name__}; expected a function or its JSON schema")
        return get_json_schema(tool)
    wrapped: Any = dict(tool) if tool.get("type") == "function" else {"type": "function", "function": tool}
    function = wrapped.get("function")
    others = {"inputSchema", "input_schema"}  # MCP's and Anthropic's names of the parameters
    known = isinstance(function, Mapping) and isinstance(function.get("name"), str) and not others & function.keys()
    if not known or not function["name"]:
        raise InputError(
            f"tools[{place}] is {tool!r}; expected a function's schema: "
            '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'
        )
    parameters = function.get("parameters", {"type": "object", "properties": {}})
    if not isinstance(parameters, Mapping) or parameters.get("type") != "object":
        raise InputError(
            f"tools[{place}] ({function['name']}): parameters is {parameters!r}; expected a JSON schema of type 'object'"
        )
    return {**wrapped, "function": {**function, "parameters": parameters}}


def name_tools(tools: Sequence[Any]) -> list[str]:
    """The names of tools as `read_tools` gives them."""
    return [tool["function"]["name"] for tool in tools]


@dataclass(frozen=True)
class ToolFormat:
    """How a checkpoint's model writes a call.

    Attributes:
        name: mlx-lm's, of its parser.
        start, end: what stands before and after a call; `end` is "" where a call goes on to the end of the answer.
        parse: mlx-lm's parser of what stands between, which also takes the tools.
        tools: those that may be called.
        shows_special_tokens: whether start or end is a special token, which text otherwise leaves out.
    """

    name: str
    start: str
    end: str
    parse: Callable[..., Any]
    tools: tuple[dict[str, Any], ...]
    shows_special_tokens: bool

    def read(self, text: str) -> tuple[tuple[ToolCall, ...], tuple[InvalidToolCall, ...]]:
        """The calls in an answer's text, in their order, and what was to be one and is not."""
        calls: list[ToolCall] = []
        invalid: list[InvalidToolCall] = []
        place = text.find(self.start)
        while place >= 0:
            inside = place + len(self.start)
            ends = (
                [m.end() for m in re.finditer(re.escape(self.end), text[inside:])] if self.end else [len(text) - inside]
            )
            if not ends:
                invalid.append(InvalidToolCall(text[place:], f"is cut off: {self.end} is missing"))
                break
            found, error, end = self._read_first(text, place, [inside + end for end in ends])
            calls += found
            if error is not None:
                invalid.append(InvalidToolCall(text[place:end], f"{type(error).__name__}: {error}"))
            place = text.find(self.start, end)
        return tuple(calls), tuple(invalid)

    def _read_first(self, text: str, place: int, ends: Sequence[int]) -> tuple[list[ToolCall], Exception | None, int]:
        """What begins at a place, up to the first end mark behind which it can be read: an argument may hold one, too."""
        first: Exception | None = None
        for end in ends:
            written = text[place:end]
            try:
                return self._read_calls(written[len(self.start) : len(written) - len(self.end)], written), None, end
            except Exception as error:  # mlx-lm's parsers raise what their text makes them raise
                first = first or error
        return [], first, ends[0]

    def _read_calls(self, inside: str, written: str) -> list[ToolCall]:
        parsed = self.parse(inside, list(self.tools))
        calls = []
        for call in parsed if isinstance(parsed, list) else [parsed]:
            name, arguments = call["name"], call.get("arguments", {})
            if isinstance(arguments, str):
                arguments = json.loads(arguments)
            if name not in name_tools(self.tools):
                raise ValueError(f"there is no tool {name!r}; there are {', '.join(name_tools(self.tools))}")
            if not isinstance(arguments, dict):
                raise ValueError(f"arguments of {name} are {arguments!r}; expected an object")
            calls.append(ToolCall(name, arguments, written))
        return calls


def find_tool_format(tokenizer: Tokenizer, tools: Sequence[Any]) -> ToolFormat:
    """The form of calls that a chat template teaches, as mlx-lm tells it; Hermes' where the template does not say."""
    known = SimpleNamespace(chat_template=tokenizer.tool_template, get_vocab=dict)
    name = mlx_lm_module("tokenizer_utils")._infer_tool_parser(known) or _HERMES
    parser = mlx_lm_module(f"tool_parsers.{name}")
    start, end = parser.tool_call_start, parser.tool_call_end
    shows = _is_special(tokenizer, start) or _is_special(tokenizer, end)
    return ToolFormat(name, start, end, parser.parse_tool_call, tuple(tools), shows)


def cut_tool_calls(text: str, calls: Sequence[ToolCall]) -> str:
    """A text without calls that were read in it, nor white space at its end; unchanged where there are none."""
    if not calls:
        return text
    for call in dict.fromkeys(call.text for call in calls):
        text = text.replace(call, "")
    return text.rstrip() if text.strip() else ""


def write_tool_grammar(
    tokenizer: Tokenizer, form: ToolFormat, tool_choice: str, *, parallel_tool_calls: bool
) -> str | None:
    """The grammar, in llguidance's Lark, of an answer that may, must or must not call tools; None where it may be anything.

    Calls are written as chat templates write them: Hermes' lines, and JSON with a space after commas and colons.

    Raises:
        GrammarError: the choice cannot be enforced in this form of calls.
    """

    def mark(text: str) -> str:
        return f"<[{tokenizer.token_id(text)}]>" if _is_special(tokenizer, text) else _quote(text)

    if tool_choice == "none":
        if _is_special(tokenizer, form.start):  # which no text holds
            return "start: TEXT\nTEXT: /(.|\\n)*/"
        return f"start: TEXT\nTEXT: /(.|\\n)*/ & ~/(.|\\n)*{_escape(form.start)}(.|\\n)*/"
    if form.name != _HERMES:
        if tool_choice == "auto" and parallel_tool_calls:
            return None
        asked = f"tool_choice {tool_choice!r}" if tool_choice != "auto" else "parallel_tool_calls False"
        raise GrammarError(
            f"{asked} cannot be enforced in the form of calls that the chat template teaches ({form.name}); expected "
            f"'auto' or 'none', and parallel calls; or a template with JSON between <tool_call> and </tool_call>"
        )
    called = [tool["function"] for tool in form.tools if tool_choice in (*TOOL_CHOICES, tool["function"]["name"])]
    more = f'("\\n" {mark(form.start)} call)*' if parallel_tool_calls and tool_choice in TOOL_CHOICES else ""
    # A lazy head ends with the first mark in a text, so that all that begins like a call is one.
    is_lazy = not _is_special(tokenizer, form.start)
    lines = [
        f"start: TEXT | head call {more}" if tool_choice == "auto" else f"start: {mark(form.start)} call {more}",
        f"head{'[lazy]' if is_lazy else ''}: TEXT {mark(form.start)}",
        f'call: "\\n" ({" | ".join(f"call_{i}" for i in range(len(called)))}) "\\n" {mark(form.end)}',
        "TEXT: /(.|\\n)*/",
    ]
    for i, function in enumerate(called):
        before = f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        schema = make_parameters_schema(function["parameters"]) | {"x-guidance": _JSON_OPTIONS}
        lines += [f'call_{i}: {_quote(before)} arguments_{i} "}}"', f"arguments_{i}: %json {json.dumps(schema)}"]
    return "\n".join(lines)


def _is_special(tokenizer: Tokenizer, text: str) -> bool:
    """Whether it is a token that is left out of text."""
    token = tokenizer.token_id(text)
    return token is not None and tokenizer.decode([token], skip_special_tokens=True) == ""


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    """For a regular expression between slashes."""
    return "".join(char if char.isalnum() or char == "_" else f"\\x{ord(char):02x}" for char in text)
