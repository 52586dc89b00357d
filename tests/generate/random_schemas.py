"""Random JSON schemas of all keywords that can be enforced, each with a short answer."""

from __future__ import annotations

import random
from typing import Any

PATTERNS = ["^[a-z]{2,6}$", "^[A-Z][a-z]*( [A-Z][a-z]*)?$", "^\\d{3}-\\d{2}$", "^(yes|no|maybe)$", "^\\w+@\\w+\\.org$"]
FORMATS = ["date", "time", "date-time", "uuid", "ipv4", "email"]
NAMES = ["name", "age", "city", "tags", "is_open", "größe", "a b", 'say "hi"', "x"]
SCALARS = [True, False, None, 0, -1, 3.5, "red", 'a "quoted" one', "日本", ""]


def make_schema(random_: random.Random, depth: int = 3) -> Any:
    """A schema whose objects are closed and whose lists and texts, but for some, are bounded."""
    kinds = [_string, _integer, _number, _choice, _boolean]
    if depth:
        kinds += [_object, _object, _array, _tuple, _union, _all_of]
    return random_.choice(kinds)(random_, depth)


def _string(random_: random.Random, _depth: int) -> Any:
    kind = random_.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": random_.choice(PATTERNS), "maxLength": 20}
    if kind == 1:
        return {"type": "string", "format": random_.choice(FORMATS), "maxLength": 40}
    least = random_.randrange(6)
    return {"type": "string", "minLength": least, "maxLength": least + random_.randrange(20)}


def _integer(random_: random.Random, _depth: int) -> Any:
    low = random_.randint(-1000, 1000)
    schema = {"type": "integer", "minimum": low, "maximum": low + random_.randint(10, 10_000)}
    return schema | ({"multipleOf": random_.choice([2, 5])} if random_.random() < 0.3 else {})


def _number(random_: random.Random, _depth: int) -> Any:
    # With a grid: a small model may write the digits of a free number to the last token, and all of them are valid.
    low = random_.randint(-10, 10)
    return {
        "type": "number",
        "minimum": low,
        "maximum": low + random_.randint(1, 100),
        "multipleOf": random_.choice([0.5, 0.25]),
    }


def _choice(random_: random.Random, _depth: int) -> Any:
    if random_.random() < 0.3:
        return {"const": random_.choice(SCALARS)}
    return {"enum": random_.sample(SCALARS, random_.randint(1, 4))}


def _boolean(_random: random.Random, _depth: int) -> Any:
    return {"type": ["boolean", "null"]}


def _object(random_: random.Random, depth: int) -> Any:
    names = random_.sample(NAMES, random_.randint(1, 4))
    required = random_.sample(names, random_.randint(0, len(names)))
    properties = {name: make_schema(random_, depth - 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(random_: random.Random, depth: int) -> Any:
    least = random_.randrange(2)
    most = least + random_.randrange(3)
    return {
        "type": "array",
        "items": make_schema(random_, depth - 2 if depth > 1 else 0),
        "minItems": least,
        "maxItems": most,
    }


def _tuple(random_: random.Random, depth: int) -> Any:
    parts = [make_schema(random_, max(0, depth - 2)) for _ in range(random_.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _union(random_: random.Random, depth: int) -> Any:
    return {"anyOf": [make_schema(random_, depth - 1) for _ in range(2)]}


def _all_of(random_: random.Random, depth: int) -> Any:
    if random_.random() < 0.5:
        return {
            "allOf": [{"type": "integer"}, {"minimum": random_.randint(0, 9)}, {"maximum": random_.randint(10, 99)}]
        }
    return {"$ref": "#/$defs/node", "$defs": {"node": _object(random_, depth - 1)}} if depth == 3 else {"type": "null"}
