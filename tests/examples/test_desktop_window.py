"""The window of examples/desktop_window.py keeps what it promises, on a display of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURE = EXAMPLES / "desktop_window.png"
YOU = (0x09, 0x69, 0xDA)  # the colour of "You"


@pytest.fixture(scope="module")
def display() -> Iterator[str]:
    """The name of a display that nobody sees."""
    if sys.platform == "darwin":
        pytest.skip("tkinter on a Mac has no display to itself: the window would open before you")
    pytest.importorskip("tkinter", reason="this Python has no tkinter", exc_type=ImportError)
    if shutil.which("Xvfb") is None:
        pytest.skip("Xvfb is not installed (Debian: apt install xvfb)")
    read, write = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(write), "-screen", "0", "1280x900x24", "-nolisten", "tcp"],
        pass_fds=[write], stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(write)
    with os.fdopen(read) as numbers:
        number = numbers.readline().strip()  # once it serves
    try:
        assert number, "Xvfb did not start"
        yield f":{number}"
    finally:
        server.terminate()
        server.wait()


def drive(display: str, *arguments: str) -> None:
    driver = Path(__file__).with_name("window_driver.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(driver), *arguments],
        env=dict(os.environ) | {"DISPLAY": display, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_window_lives_while_it_loads_and_answers_stops_with_escape_and_closes_the_engine(display: str) -> None:
    drive(display, "chat")


def test_a_model_that_is_not_there_is_told_of_in_the_window(display: str) -> None:
    drive(display, "no_model")


def test_the_picture_in_the_readme_is_what_it_looks_like(display: str, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    if not pytest.importorskip("PIL.features").check("xcb"):
        pytest.skip("this Pillow cannot take pictures of a display")
    drive(display, "picture", str(tmp_path / "now.png"))
    assert PICTURE.stat().st_size < 200_000
    with image.open(PICTURE) as stored, image.open(tmp_path / "now.png") as now:
        assert stored.size == now.size
        for picture in (stored, now):
            colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
            assert YOU in colours and len(colours) > 50
