"""get_json_schema equals transformers' own on functions of every shape."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any, Literal

import pytest

from arcee_mlx.checkpoint.function_schema import get_json_schema

pytestmark = pytest.mark.parity


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Mixed(Enum):
    A = 1
    B = "b"
    C = None


def plain(a: int, b: float, c: str, d: bool, e: Any, f: list, g: dict, h: tuple) -> None:
    """Every basic type.

    Args:
        a: An integer.
        b: A number,
            on two lines.
        c: Text: with a colon.
        d: A flag (default: False)
        e: Anything.
        f: A list.
        g: A mapping.
        h: A tuple.
    """


def nested(a: list[dict[str, list[int]]], b: tuple[int, str], c: dict[str, int | list[str]]) -> list[int]:
    """Nested types,

    with a description of two paragraphs.

    Args:
        a: Deep.

        b: A pair.
        c: Values.

    Returns:
        A list
        of numbers.

    Raises:
        ValueError: Never.
    """
    return []


def optional(a: int | None, b: int | str | None = None, c: list[int] | str = "x", d: list | tuple = ()) -> str:
    """Unions.

    Args:
        a: One.
        b: Two.
        c: Three.
        d: Four.
    """
    return ""


def choices(a: str, b: Literal["x", 1, None], c: Color, d: Mixed, e: Color | None = None) -> object:
    """Fixed values.

    Args:
        a: A drink (choices: ["tea ", "coffee"])
        b: A literal.
        c: A color.
        d: A mixture.
        e: Perhaps a color.

    Returns:
        Something without a schema.
    """


def nothing() -> dict[str, int]:
    """Take nothing.

    Returns: a mapping
    """
    return {}


def one_line(a: int = 3) -> None:
    """One line. Args: none to speak of.

    Args:
      a: Indented by two.
    """


class Holder:
    def method(self, a: int) -> int:
        """A method.

        Args:
            a: A number.
        """
        return a


@pytest.mark.parametrize(
    "function", [plain, nested, optional, choices, nothing, one_line, Holder().method, Holder.method]
)
def test_schemas_equal_transformers(function: Callable[..., Any]) -> None:
    theirs = pytest.importorskip("transformers.utils").get_json_schema(function)
    assert get_json_schema(function) == theirs
