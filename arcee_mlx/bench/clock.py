"""--clock: by what a benchmark measures."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import mlx.core as mx

from ..errors import InputError

Clock = Callable[[], float]  # gives seconds

_CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the option; `read_clock` takes what it parses to."""
    parser.add_argument(
        "--clock",
        choices=_CLOCKS,
        default="wall",
        help="to measure by (%(default)s); on MLX's CPU backend cpu leaves out other programs' turns on a busy machine",
    )


def read_clock(args: argparse.Namespace) -> Clock:
    """The clock that is asked for.

    Raises:
        InputError: it does not see the device's time.
    """
    if args.clock == "cpu" and mx.default_device() == mx.gpu:
        raise InputError("--clock is cpu on a GPU, whose time it does not see; expected wall there; leave --clock out")
    return _CLOCKS[args.clock]
