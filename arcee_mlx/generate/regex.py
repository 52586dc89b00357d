"""Regular expressions in llguidance's syntax (Rust's), meaning what they mean where the caller wrote them.

The two syntaxes differ in silence in a few places: what `\\w` and `\\s` hold, and what stands in a character class. Those are
rewritten. Elsewhere they differ aloud, and llguidance says what it does not take (look-around, backreferences).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

from ..errors import GrammarError

# Python's str.isalnum and str.isspace. Rust's \w has combining marks, too; its \s lacks four separators.
_PYTHON_CLASSES = {
    "w": r"[\p{L}\p{N}_]",
    "W": r"[^\p{L}\p{N}_]",
    "s": r"[\s\x1c-\x1f]",
    "S": r"[^\s\x1c-\x1f]",
}
# ECMA-262's white space has the byte order mark. llguidance makes \d and \w of a schema's pattern ASCII by itself.
_ECMA_CLASSES = {"s": r"[\s\x{feff}]", "S": r"[^\s\x{feff}]"}


def translate_python_regex(pattern: str) -> str:
    """A pattern that matches, whole, exactly what `re.fullmatch` of `pattern` matches.

    Raises:
        GrammarError: Python does not take it, or it has a possessive quantifier, which Rust would read as a plain one.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of "[[" and its like, which `_translate` makes plain
            re.compile(pattern)
    except (re.error, OverflowError) as error:
        raise GrammarError(f"regex {pattern!r}: {error}; expected a regular expression of Python's re") from error
    if re.search(r"\(\?[a-z]*x", pattern):
        raise GrammarError(f"regex {pattern!r} is verbose (flag x); expected one without white space and comments")
    return _translate(pattern, _PYTHON_CLASSES, has_possessive=True)


def translate_ecma_regex(pattern: str) -> str:
    """A pattern that means to llguidance what a schema's `pattern` means, as JSON Schema has it: ECMA-262's."""
    return _translate(pattern, _ECMA_CLASSES, has_possessive=False)


def _translate(pattern: str, classes: Mapping[str, str], *, has_possessive: bool) -> str:
    translated: list[str] = []
    in_class, place = False, 0
    while place < len(pattern):
        char = pattern[place]
        if char == "\\":
            escaped = pattern[place + 1 : place + 2]
            translated.append(classes.get(escaped, char + escaped))
            place += 2
            continue
        if in_class:
            in_class = char != "]"
            # In Rust these begin a nested class, or name what two classes share.
            translated.append("\\" + char if char in "[&~" else char)
        elif char == "[":
            in_class = True
            opening = re.compile(r"\[\^?\]?").match(pattern, place)  # Python takes a "]" that comes first as itself
            assert opening is not None
            translated.append(opening[0].replace("]", r"\]"))
            place = opening.end()
            continue
        else:
            quantified = has_possessive and char == "+" and place > 0 and pattern[place - 1] in "*+?}"
            if quantified and not _is_escaped(pattern, place - 1):
                raise GrammarError(
                    f"regex {pattern!r} has a possessive quantifier at place {place - 1}; expected a plain one"
                )
            translated.append(char)
        place += 1
    return "".join(translated)


def _is_escaped(pattern: str, place: int) -> bool:
    before = pattern[:place]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1
