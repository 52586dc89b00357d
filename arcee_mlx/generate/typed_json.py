"""Python types as JSON: the schema of a dataclass, TypedDict or any hint made of basic types, and a value read back."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from typing import Any, Literal, NotRequired, Required, Union

from ..errors import GrammarError

_BASIC: dict[Any, str] = {
    int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", list: "array", dict: "object",
}  # fmt: skip
_Definitions = dict[Any, tuple[str, dict[str, Any]]]  # a class -> its name in $defs, its schema
_WANT = (
    "expected basic types, list, tuple, dict with str keys, Literal, Enum, unions, dataclasses or TypedDicts of those"
)


def is_type(hint: Any) -> bool:
    """Whether it is a type or a type hint, and not a value."""
    return isinstance(hint, type | types.UnionType) or typing.get_origin(hint) is not None or typing.is_typeddict(hint)


def describe_type(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type, closed: objects have the declared properties only.

    A field with a default may be missing from the answer. Dataclasses and TypedDicts may name one another and themselves.

    Raises:
        GrammarError: a hint has no JSON form; names it.
    """
    definitions: _Definitions = {}
    schema = _describe(hint, definitions)
    return schema | {"$defs": dict(definitions.values())} if definitions else schema


def read_type(hint: Any, value: Any) -> Any:
    """A JSON value as an instance of a type.

    Raises:
        ValueError: it does not fit the type, or a dataclass refuses it.
    """
    hint, origin, arguments = _take_apart(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _read_union(arguments, value)
    if origin is Literal:
        if not any(one == value and type(one) is type(value) for one in arguments):
            raise ValueError(f"{value!r} is none of {arguments}")
        return value
    if origin is list or origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{value!r} is no {hint}")
        same = origin is list or ... in arguments
        if not same and len(value) != len(arguments):
            raise ValueError(f"{value!r} has {len(value)} items; expected the {len(arguments)} of {hint}")
        items = [read_type(arguments[0] if same else arguments[i], item) for i, item in enumerate(value)]
        return items if origin is list else tuple(items)
    if origin is dict:
        return {key: read_type(arguments[1], item) for key, item in _read_object(hint, value).items()}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if (fields := _fields(hint)) is not None:
        found = _read_object(hint, value)
        if found.keys() - fields or {name for name, (_, required) in fields.items() if required} - found.keys():
            raise ValueError(f"{value!r} has not the fields of {hint.__name__}")
        return hint(**{name: read_type(fields[name][0], item) for name, item in found.items()})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is tuple and isinstance(value, list):
        return tuple(value)
    if type(value) is not hint:
        raise ValueError(f"{value!r} is no {hint}")
    return value


def _describe(hint: Any, definitions: _Definitions) -> dict[str, Any]:
    hint, origin, arguments = _take_apart(hint)
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_describe(argument, definitions) for argument in arguments]}
    if origin is Literal:
        return {"enum": _check_values(list(arguments), hint)}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": _check_values([member.value for member in hint], hint)}
    if origin is list:
        return {"type": "array", "items": _describe(arguments[0], definitions)}
    if origin is tuple and arguments and arguments[-1] is ...:
        return {"type": "array", "items": _describe(arguments[0], definitions)}
    if origin is tuple and arguments:
        items = [_describe(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    if origin is dict and arguments[0] is str:
        return {"type": "object", "additionalProperties": _describe(arguments[1], definitions)}
    if (fields := _fields(hint)) is not None:
        return _describe_fields(hint, fields, definitions)
    if hint not in _BASIC:
        raise GrammarError(f"schema: the type {hint!r} has no JSON form here; {_WANT}; or take a Pydantic model")
    return {"type": _BASIC[hint]}


def _describe_fields(hint: Any, fields: dict[str, tuple[Any, bool]], definitions: _Definitions) -> dict[str, Any]:
    if hint not in definitions:
        taken = sum(hint.__name__ == other.__name__ for other in definitions)
        name = f"{hint.__name__}{taken + 1 if taken else ''}"
        definitions[hint] = name, {}  # in the making: a field may be of this type
        schema = {
            "type": "object",
            "properties": {field: _describe(kind, definitions) for field, (kind, _) in fields.items()},
            "required": [field for field, (_, required) in fields.items() if required],
            "additionalProperties": False,
        }
        definitions[hint] = name, schema
    return {"$ref": f"#/$defs/{definitions[hint][0]}"}


def _fields(hint: Any) -> dict[str, tuple[Any, bool]] | None:
    """Field name -> (hint, whether it must be there), of a dataclass or TypedDict; None of anything else."""
    if typing.is_typeddict(hint):
        return {name: (kind, name in hint.__required_keys__) for name, kind in _hints(hint).items()}
    if not (isinstance(hint, type) and dataclasses.is_dataclass(hint)):
        return None
    hints = _hints(hint)
    missing = dataclasses.MISSING
    return {
        field.name: (hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(hint)
        if field.init
    }


def _hints(hint: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(hint)
    except (NameError, TypeError) as error:
        raise GrammarError(f"schema: the hints of {hint.__name__} cannot be read ({error}); {_WANT}") from error


def _take_apart(hint: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    hint = type(None) if hint is None else hint
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Annotated, Required, NotRequired):
        return _take_apart(arguments[0])
    return hint, origin, arguments


def _read_union(arguments: tuple[Any, ...], value: Any) -> Any:
    for argument in sorted(arguments, key=lambda kind: kind is not type(value)):  # 1 is an int before it is a float
        try:
            return read_type(argument, value)
        except (ValueError, TypeError):
            continue
    raise ValueError(f"{value!r} is none of {arguments}")


def _read_object(hint: Any, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no {hint}")
    return value


def _check_values(values: list[Any], hint: Any) -> list[Any]:
    if not values or any(type(value) not in (int, float, str, bool, type(None)) for value in values):
        raise GrammarError(f"schema: the values of {hint} are {values}; expected numbers, texts, booleans or None")
    return values
