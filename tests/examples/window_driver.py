"""Sits before examples/desktop_window.py, as a program of its own with a display of its own.

    python tests/examples/window_driver.py chat | no_model | picture FILE.png

`picture` makes the one in the README. A program of its own, since tkinter's objects must die in the thread that made them.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import desktop_window  # noqa: E402

from arcee_mlx import DEMO_MODEL, Engine, GenerateOptions  # noqa: E402

PATIENCE_S = 120.0
NO_END = {1: -1e4, 3: -1e4}  # the demo's tokens that end an answer


class Driver:
    """Opens a window, and lets its main loop run until what is waited for is there."""

    def __init__(self, model: str, options: GenerateOptions) -> None:
        self.window = desktop_window.ChatWindow(model, None, options)
        self.window.root.report_callback_exception = self._fail  # tkinter would print it and go on
        self._error: BaseException | None = None

    def wait_until(self, condition: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENCE_S

        def look() -> None:
            if condition():
                self.window.root.quit()
            else:
                assert time.monotonic() < until_s, f"{self.status!r}, {self.page[-500:]!r}"
                self.window.root.after(5, look)

        self.window.root.after(0, look)
        self.window.root.mainloop()
        if self._error is not None:
            raise self._error

    def press(self, key: str) -> None:
        self.window.entry.focus_force()
        self.window.root.update()
        self.window.entry.event_generate(key)

    def say(self, text: str) -> None:
        self.window.entry.insert(0, text)
        self.press("<Return>")

    @property
    def page(self) -> str:
        return self.window.page.get("1.0", "end-1c")

    @property
    def status(self) -> str:
        return self.window.status.get()

    @property
    def buttons(self) -> tuple[bool, bool]:
        """Whether Send and Stop can be pressed."""
        return self.window.send_button.instate(["!disabled"]), self.window.stop_button.instate(["!disabled"])

    def _fail(self, kind: Any, error: BaseException, trace: Any) -> None:
        self._error = error
        self.window.root.quit()


def chat() -> None:
    """Types while the model loads, reads an answer as it grows, stops one with Escape, closes the window during one."""
    load, typed = Engine.load, threading.Event()

    def load_late(model: str) -> Engine:
        assert typed.wait(PATIENCE_S)
        return load(model)

    desktop_window.Engine.load = load_late  # type: ignore[method-assign, assignment]
    driver = Driver(str(DEMO_MODEL), GenerateOptions(max_tokens=150, seed=1, logit_bias=NO_END))
    window = driver.window
    driver.wait_until(lambda: driver.status.startswith("Loading"))
    driver.say("Tell me about the sea.")  # too early: it stays there
    assert window.entry.get() == "Tell me about the sea." and driver.buttons == (False, False)
    typed.set()
    driver.wait_until(lambda: driver.status == "Ready")

    driver.press("<Return>")
    assert window.entry.get() == "" and driver.buttons == (False, True)
    seen: set[str] = set()
    driver.wait_until(lambda: seen.add(driver.page) or window.stream is None)  # type: ignore[func-returns-value]
    assert len(seen) >= 3, "the answer came all at once"
    assert driver.buttons == (True, False)
    assert driver.status.startswith("150 tokens, ") and driver.status.endswith("ended by max_tokens")
    said = [message.content for message in window.session.messages]
    assert driver.page == f"You\n{said[0]}\nModel\n{said[1]}\n" and said[0] == "Tell me about the sea."
    driver.wait_until(
        lambda: re.fullmatch(r"Memory: \d+ MB in use, at most \d+ of [\d,]+ MB", window.memory.get()) is not None
    )

    window.options = GenerateOptions(max_tokens=1500, logit_bias=NO_END)
    for text in ("And then?", "And after that?"):
        length = len(driver.page)
        driver.say(text)
        driver.wait_until(lambda length=length: len(driver.page) > length + 40)  # type: ignore[misc]
        if text == "And then?":
            driver.press("<Escape>")
            driver.wait_until(lambda: window.stream is None)
            assert driver.status.endswith("ended by cancelled")
            assert driver.page.endswith(f"Model\n{window.session.messages[-1].content}\n")
    engine = window.loading.result()
    window.root.after(0, window.root.destroy)
    window.run()
    assert engine.is_closed


def no_model() -> None:
    """Is told why there is none, and can close the window."""
    driver = Driver("no/such/folder", GenerateOptions())
    driver.wait_until(lambda: driver.status == "No model")
    assert "no/such/folder" in driver.page and driver.buttons == (False, False)
    driver.say("Hello?")
    driver.window.root.after(0, driver.window.root.destroy)
    driver.window.run()


def picture(file: str) -> None:
    """A conversation, caught in the middle of an answer."""
    from PIL import ImageGrab, ImageOps

    driver = Driver(str(DEMO_MODEL), GenerateOptions(max_tokens=120, temp=0.5, seed=1))
    window = driver.window
    driver.wait_until(lambda: driver.status == "Ready")
    driver.say("What shall our nation do?")
    driver.wait_until(lambda: window.stream is None)
    window.options = GenerateOptions(max_tokens=200, temp=0.5, seed=4)
    driver.say("Tell me about the whale.")
    driver.wait_until(lambda: window.stream is None or len(driver.page) > 400)
    window.entry.insert(0, "And what of the captain?")
    window.root.update()
    left, top = window.root.winfo_rootx(), window.root.winfo_rooty()
    box = (left, top, left + window.root.winfo_width(), top + window.root.winfo_height())
    ImageOps.expand(ImageGrab.grab(box, xdisplay=""), 1, desktop_window.EDGE).save(file, optimize=True)
    window.root.after(0, window.root.destroy)
    window.run()


if __name__ == "__main__":
    {"chat": chat, "no_model": no_model, "picture": picture}[sys.argv[1]](*sys.argv[2:])
