"""How a conversion says how far it is: not at all, by a bar for people, or by lines of JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import Any

_LINE_EVERY_S = 0.5


class Quiet:
    """Says nothing; the base of the others.

    Attributes:
        shows_downloads: whether huggingface_hub may show bars of its own.
    """

    shows_downloads = False

    def begin(self, stage: str, total_bytes: int, done_bytes: int = 0) -> None:
        """A stage begins: "convert", "calibrate", "check" or "verify"; of what it works through, some may be done."""

    def advance(self, tensor: str, done_bytes: int) -> None:
        """So many more bytes of a tensor of the source are done."""

    def end(self) -> None:
        """The stage is over, or broken off; called once more it does nothing."""


class Bar(Quiet):
    """A bar on standard error, if that is a terminal: bytes, rate, time left and the tensor."""

    shows_downloads = True

    def __init__(self) -> None:
        self._bar: Any = None

    def begin(self, stage: str, total_bytes: int, done_bytes: int = 0) -> None:
        """Opens the bar."""
        from tqdm import tqdm

        self.end()
        self._bar = tqdm(
            total=total_bytes,
            initial=done_bytes,
            desc=stage,
            unit="B",
            unit_scale=True,
            disable=None,
            dynamic_ncols=True,
        )

    def advance(self, tensor: str, done_bytes: int) -> None:
        """Moves it."""
        self._bar.set_postfix_str(tensor.removeprefix("model."), refresh=False)
        self._bar.update(done_bytes)

    def end(self) -> None:
        """Leaves it on the screen."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLines(Quiet):
    """An object a line on standard error, at most two a second and one at the end of each stage.

    Keys: stage, tensor, bytes, total_bytes, bytes_per_s, seconds_left; the rate is of this run, null before there is one.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._begun_s = self._said_s = 0.0
        self._begun_bytes = 0

    def begin(self, stage: str, total_bytes: int, done_bytes: int = 0) -> None:
        """Says where the stage begins."""
        self.end()
        self._state = {"stage": stage, "tensor": None, "bytes": done_bytes, "total_bytes": total_bytes}
        self._begun_s, self._begun_bytes = time.monotonic(), done_bytes
        self._say()

    def advance(self, tensor: str, done_bytes: int) -> None:
        """Counts, and says it twice a second."""
        assert self._state is not None
        self._state |= {"tensor": tensor, "bytes": self._state["bytes"] + done_bytes}
        if time.monotonic() - self._said_s >= _LINE_EVERY_S:
            self._say()

    def end(self) -> None:
        """Says where the stage ended."""
        if self._state is not None:
            self._say()
            self._state = None

    def _say(self) -> None:
        assert self._state is not None
        self._said_s = time.monotonic()
        done, elapsed_s = self._state["bytes"] - self._begun_bytes, self._said_s - self._begun_s
        rate = done / elapsed_s if done and elapsed_s else None
        left = None if rate is None else (self._state["total_bytes"] - self._state["bytes"]) / rate
        _print(self._state | {"bytes_per_s": rate and round(rate), "seconds_left": left and round(left, 1)})


def _print(values: Mapping[str, Any]) -> None:
    print(json.dumps(values), file=sys.stderr, flush=True)
