"""Python functions as tools: what cannot be described is refused with the function's and argument's name."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from arcee_mlx import InputError
from arcee_mlx.checkpoint.function_schema import get_json_schema


def no_hint(x) -> None:  # type: ignore[no-untyped-def]
    """Doc.

    Args:
        x: A value.
    """


def no_description(x: int, y: int) -> None:
    """Doc.

    Args:
        x: A value.
    """


def custom_class(x: Callable[[], int]) -> None:
    """Doc.

    Args:
        x: A value.
    """


def one_tuple(x: tuple[int]) -> None:
    """Doc.

    Args:
        x: A value.
    """


def bad_choices(x: str) -> None:
    """Doc.

    Args:
        x: A value (choices: [a, b])
    """


def no_docstring(x: int) -> None: ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_hint, "tool no_hint: argument 'x' has no type hint"),
        (no_description, "tool no_description: its docstring does not describe the argument 'y'"),
        (custom_class, "tool custom_class: argument 'x': type hint"),
        (one_tuple, "tool one_tuple: argument 'x': type hint tuple"),
        (bad_choices, "tool bad_choices: the choices of 'x'"),
        (no_docstring, "tool no_docstring has no docstring"),
    ],
)
def test_what_cannot_be_described_is_refused_by_name(function: Callable[..., None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_json_schema(function)


def test_a_method_is_described_without_its_receiver() -> None:
    class Shop:
        def price(self, item: str, count: int = 1) -> float:
            """Look up a price.

            Args:
                item: What to buy.
                count: How many.

            Returns:
                The price in euros.
            """
            return 0.0

    described = get_json_schema(Shop().price)["function"]
    assert described["name"] == "price" and described["description"] == "Look up a price."
    assert described["parameters"] == {
        "type": "object",
        "properties": {
            "item": {"type": "string", "description": "What to buy."},
            "count": {"type": "integer", "description": "How many."},
        },
        "required": ["item"],
    }
    assert described["return"] == {"type": "number", "description": "The price in euros."}
