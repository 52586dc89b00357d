"""A Python function as a tool: its JSON schema from signature and Google docstring, as transformers makes it.

Source: transformers 5.23 `utils/chat_template_utils.py`, `get_json_schema` (behaviour, not code).
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, Union

from ..errors import InputError

_TYPES: dict[Any, str] = {
    int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null",
    list: "array", tuple: "array", dict: "object",
}  # fmt: skip
_SCALARS = (int, float, str, bool, type(None))
_ARGUMENT = re.compile(r"^([ \t]*)(\w+):\s*(.*?)\s*(?=\n(?!\1[ \t])[ \t]*\w+:|\Z)", re.DOTALL | re.MULTILINE)
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def get_json_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Describes a function to a model: `{"type": "function", "function": {name, description, parameters}}`.

    Args:
        function: with type hints on all arguments, and a Google docstring that describes each. A description may end in
            `(choices: ["a", "b"])`. The first argument of a method is left out.

    Raises:
        InputError: a hint or a description is missing, or a hint has no JSON form; names the function and argument.
    """
    name = getattr(function, "__name__", "operation")
    docstring = inspect.getdoc(function)
    if not docstring:
        raise InputError(
            f"tool {name} has no docstring; expected one that says what it does and describes its arguments"
        )
    description, arguments, returns = _read_docstring(docstring.strip())
    parameters = _read_signature(function, name)
    result = parameters["properties"].pop("return", None)
    for argument, schema in parameters["properties"].items():
        if argument not in arguments:
            raise InputError(
                f"tool {name}: its docstring does not describe the argument {argument!r}; expected it in Args"
            )
        text = arguments[argument]
        if choices := _CHOICES.search(text):
            schema["enum"] = _read_choices(choices[1], name, argument)
            text = text[: choices.start()].strip()
        schema["description"] = text
    described = {"name": name, "description": description, "parameters": parameters}
    if result is not None:
        if returns is not None:
            result["description"] = returns
        described["return"] = result
    return {"type": "function", "function": described}


def _read_signature(function: Callable[..., Any], name: str) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(function)
        signature = inspect.signature(function)
    except (TypeError, ValueError, NameError) as error:
        raise InputError(
            f"tool {name}: its type hints cannot be read ({error}); expected a function; wrap it in one"
        ) from error
    receiver = next(iter(signature.parameters), None)
    if receiver not in ("self", "cls") or signature.parameters[receiver].annotation is not inspect.Parameter.empty:
        receiver = None
    properties: dict[str, Any] = {}
    required: list[str] = []
    for argument, parameter in signature.parameters.items():
        if argument == receiver:
            continue
        if parameter.annotation is inspect.Parameter.empty:
            raise InputError(f"tool {name}: argument {argument!r} has no type hint; expected one")
        if parameter.default is inspect.Parameter.empty:
            required.append(argument)
    for argument, hint in hints.items():
        try:
            properties[argument] = _describe_type(hint)
        except InputError as error:
            if argument != "return":  # the model never makes the return value: a type without a schema is left out
                raise InputError(f"tool {name}: argument {argument!r}: {error}") from error
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        schema["required"] = required
    return schema


def _describe_type(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return _describe_union(arguments)
    if origin is Literal:
        return _describe_values(list(arguments), str(hint))
    if isinstance(hint, type) and origin is None and issubclass(hint, Enum):
        return _describe_values([member.value for member in hint], hint.__name__)
    if origin is list and arguments:
        return {"type": "array", "items": _describe_type(arguments[0])}
    if origin is tuple and arguments:
        if len(arguments) == 1 or ... in arguments:
            raise InputError(f"type hint {hint}; expected a tuple of two or more types; a list[...] says what you mean")
        return {"type": "array", "prefixItems": [_describe_type(argument) for argument in arguments]}
    if origin is dict and len(arguments) == 2:
        return {"type": "object", "additionalProperties": _describe_type(arguments[1])}
    if (kind := _TYPES.get(origin or hint)) is None:
        raise InputError(
            f"type hint {hint!r}; expected a basic type, an Enum, a Literal, or a list, tuple, dict or union of those"
        )
    return {"type": kind}


def _describe_union(arguments: Sequence[Any]) -> dict[str, Any]:
    kinds = [_describe_type(argument) for argument in arguments if argument is not type(None)]
    if len(kinds) == 1:
        schema = kinds[0]
    elif all(kind.keys() == {"type"} and isinstance(kind["type"], str) for kind in kinds):
        names = sorted({kind["type"] for kind in kinds})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": kinds}
    return schema | {"nullable": True} if type(None) in arguments else schema


def _describe_values(values: list[Any], where: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise InputError(f"values of {where} are {values}; expected at least one, each a number, text, boolean or None")
    kinds = list(dict.fromkeys(_TYPES[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _read_choices(text: str, name: str, argument: str) -> list[Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"tool {name}: the choices of {argument!r} are {text!r}; expected a JSON list ({error})"
        ) from error
    return [value.strip() if isinstance(value, str) else value for value in values]


def _read_docstring(text: str) -> tuple[str, dict[str, str], str | None]:
    """Description, argument name -> description, and what is returned. A section's name ends the one before anywhere."""
    description = re.split(r"(?:Args|Returns|Raises):", text, maxsplit=1)[0].strip()
    described = re.search(r"\n\s*Args:\n(.*)", text, re.DOTALL)
    block = re.split(r"(?:Returns|Raises):", described[1], maxsplit=1)[0] if described else ""
    block = "\n".join(line for line in block.splitlines() if line.strip())
    arguments = {match[2]: re.sub(r"\s*\n+\s*", " ", match[3].strip()) for match in _ARGUMENT.finditer(block)}
    returned = re.search(r"\n\s*Returns:\n(.*)", text, re.DOTALL)
    return description, arguments, returned[1].split("Raises:")[0].strip() if returned else None
