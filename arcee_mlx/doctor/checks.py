"""What a check is, and how it is run: one that breaks down has found a problem, and the others go on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPORT = "please report it with the output of `arcee-mlx doctor --json`"


@dataclass(frozen=True)
class Check:
    """What a check found. Nothing in it names a folder, a user or a host: it is made to be sent.

    Attributes:
        facts: for programs, as JSON has them.
        lines: the same for people.
        problems: what needs attention, and what to do about it; nothing where all is well.
    """

    facts: Mapping[str, Any]
    lines: tuple[str, ...]
    problems: tuple[str, ...] = ()


def run_check(name: str, check: Callable[[], Check]) -> Check:
    """Calls a check; what it raises is what it found."""
    try:
        return check()
    except Exception as error:
        trail = [
            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}"
            for frame in traceback.extract_tb(error.__traceback__)[1:]
        ]
        text = f"{type(error).__name__}: {describe_error(error)}"
        problem = f"{name}: the check itself failed: {text}; {REPORT}"
        return Check({"error": text, "trail": trail}, (f"could not be checked: {text}",), (problem,))


def describe_error(error: BaseException) -> str:
    """Its text in one line of at most 600 characters, with the last names of paths alone."""
    text = " ".join(str(error).replace(str(Path.home()), "~").split())
    return re.sub(r"(?<![\w./])~?/(?:[^/\s'\"]+/)*(?=[^/\s])", "", text)[:600]
