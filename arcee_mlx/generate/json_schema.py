"""JSON schemas for an answer: from a dict or a Python type, made ready for llguidance; and the answer read back.

A schema is enforced as JSON Schema draft 2020-12 means it, formats included, or refused by the name of what cannot be. An
enforced schema may be narrower than the written one: properties come in its order, and numbers in their shortest kind.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ..errors import GrammarError, InputError
from .regex import translate_ecma_regex
from .typed_json import describe_type, is_type, read_type

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLES = (
    "items", "additionalProperties", "unevaluatedProperties", "unevaluatedItems", "propertyNames", "contains", "not", "if",
    "then", "else",
)  # fmt: skip
# For llguidance. Strict whatever a schema says of itself; a model that may write white space writes it without end.
STRICT_JSON = {"whitespace_flexible": False, "coerce_one_of": False, "lenient": False}
_COMPOSING = {
    "allOf",
    "anyOf",
    "oneOf",
    "not",
    "if",
    "then",
    "else",
    "dependentSchemas",
    "$ref",
    "unevaluatedProperties",
}
# What older drafts said and 2020-12 does not, so that it would do nothing.
_OLD_KEYWORDS = ("additionalItems", "divisibleBy", "disallow", "extends")

_DAY = (
    r"(?:\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    r"|(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29)"
)
_CLOCK = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d+)?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# llguidance's own allow 29 February in every year and leap seconds at any time. Here: none, as in most years.
_FORMATS = {"date": f"^{_DAY}$", "time": f"^{_CLOCK}$", "date-time": f"^{_DAY}[Tt]{_CLOCK}$"}


def check_schema(schema: Any) -> None:
    """Raises InputError unless it is something a schema can be made of."""
    if not isinstance(schema, dict | bool) and not is_type(schema):
        raise InputError(
            f"schema is of type {type(schema).__name__}; expected a JSON schema as a dict, a Pydantic model, or a type "
            f"such as a dataclass or TypedDict; read a schema's text with json.loads"
        )


def make_json_schema(schema: Any) -> dict[str, Any]:
    """The JSON schema that a `schema` option stands for, in the form llguidance is given.

    Raises:
        GrammarError: a type without a JSON form, or a keyword that cannot be enforced; names it and its place.
    """
    if schema is False:
        raise GrammarError("schema is False, which no answer meets; expected one that some answer meets")
    if isinstance(schema, bool):
        return {}
    if isinstance(schema, dict):
        made = _copy_json(schema)
    elif hasattr(schema, "model_json_schema"):
        made = _copy_json(schema.model_json_schema())
        for _, part in _walk(made):  # the model would ignore or refuse what it does not declare
            if "properties" in part:
                part.setdefault("additionalProperties", False)
    else:
        made = describe_type(schema)
    for place, part in list(_walk(made)):
        _prepare(place, part)
    return made


def make_parameters_schema(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The same for a tool's parameters: `nullable`, which tools' schemas say, too, is a union with null; the arguments are
    those that are declared; and a tuple is whole.
    """
    schema = _copy_json(dict(parameters))
    _close(schema)
    for _, part in list(_walk(schema)):
        if part.pop("nullable", False):
            inner = dict(part)
            part.clear()
            part["anyOf"] = [inner, {"type": "null"}]
    return make_json_schema(schema)


def _close(schema: Any) -> None:
    """Closes objects and tuples, but for those of which another part may say more."""
    if not isinstance(schema, dict) or not _COMPOSING.isdisjoint(schema):
        return
    if schema.get("type") == "object":
        schema.setdefault("additionalProperties", False)
    if isinstance(items := schema.get("prefixItems"), list):
        schema.setdefault("items", False)
        schema.setdefault("minItems", len(items))
    inner = [schema.get("items"), *(items if isinstance(items, list) else ())]
    if isinstance(properties := schema.get("properties"), dict):
        inner += properties.values()
    for part in inner:
        _close(part)


def parse_answer(schema: Any, text: str) -> Any:
    """What a complete answer means: for a type its instance, for a dict what json.loads makes of it.

    Raises:
        pydantic.ValidationError: a Pydantic model's own validators refuse what its JSON schema allows.
        ValueError: the same from a dataclass.
    """
    if hasattr(schema, "model_validate_json"):
        return schema.model_validate_json(text)
    value = json.loads(text)
    return value if isinstance(schema, dict | bool) else read_type(schema, value)


def explain_refusal(schema: dict[str, Any], message: str, is_refused: Callable[[dict[str, Any]], bool]) -> GrammarError:
    """Names the keyword that a schema was refused for, and where it stands.

    Args:
        message: llguidance's.
        is_refused: whether llguidance refuses another schema, too.
    """
    reason = message.strip().splitlines()[0]
    named = [(place, key) for place, part in _walk(schema) for key in part if f'"{key}"' in reason]
    for place, key in named or _find_culprit(schema, is_refused):
        return GrammarError(
            f"schema: {key!r} at {place} cannot be enforced ({reason}); expected a schema whose every keyword can be; "
            f"leave it out and check the answer yourself, or say it in another way"
        )
    return GrammarError(f"schema cannot be enforced ({reason}); expected one that can be; say it in another way")


def _find_culprit(schema: dict[str, Any], is_refused: Callable[[dict[str, Any]], bool]) -> list[tuple[str, str]]:
    """The keyword without which, and without those inside it or after it, the schema would be taken; none where none is."""
    rest = copy.deepcopy(schema)
    for place, part in reversed(list(_walk(rest))):
        for key in reversed(list(part)):
            del part[key]
            if not is_refused(rest):
                return [(place, key)]
    return []


def _walk(schema: Any, place: str = "$") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema in a schema, itself first, with its place; not what only looks like one, in an enum for example."""
    if not isinstance(schema, dict):
        return
    yield place, schema
    for key in _MAPS:
        if isinstance(inner := schema.get(key), dict):
            for name, part in inner.items():
                yield from _walk(part, f"{place}.{key}.{name}")
    for key in _LISTS:
        if isinstance(inner := schema.get(key), list):
            for index, part in enumerate(inner):
                yield from _walk(part, f"{place}.{key}[{index}]")
    for key in _SINGLES:
        yield from _walk(schema.get(key), f"{place}.{key}")


def _prepare(place: str, schema: dict[str, Any]) -> None:
    for key in _OLD_KEYWORDS:
        if key in schema:
            raise GrammarError(f"schema: {key!r} at {place} is of an older draft; expected JSON Schema draft 2020-12")
    if isinstance(schema.get("items"), list):
        raise GrammarError(f"schema: 'items' at {place} is a list; expected one schema; draft 2020-12 has prefixItems")
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        if isinstance(schema.get(key), bool):
            raise GrammarError(
                f"schema: {key!r} at {place} is {schema[key]}; expected a number, as draft 2020-12 has it"
            )
    if isinstance(pattern := schema.get("pattern"), str):
        schema["pattern"] = translate_ecma_regex(pattern)
    if isinstance(properties := schema.get("patternProperties"), dict):
        schema["patternProperties"] = {translate_ecma_regex(name): part for name, part in properties.items()}
    if isinstance(schema.get("format"), str) and (own := _FORMATS.get(schema["format"])) is not None:
        del schema["format"]
        schema["allOf"] = [*schema.get("allOf", ()), {"pattern": own}]


def _copy_json(schema: dict[str, Any]) -> dict[str, Any]:
    """A copy to change, without what would tell llguidance to be lenient."""
    try:
        copied: dict[str, Any] = json.loads(json.dumps(schema, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"schema is not JSON ({error}); expected a dict that json.dumps can write") from error
    copied.pop("x-guidance", None)
    return copied
