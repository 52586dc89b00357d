"""What memory this process needs, apart from freed pages that its malloc only keeps for later."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WINDOWS = 20


class _Mallinfo2(ctypes.Structure):
    """glibc's, since 2.33; of all its arenas together."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


@dataclass(frozen=True)
class ProcessMemory:
    """At one moment, in bytes.

    Attributes:
        resident: all that is in physical memory.
        kept: of it, what is free in malloc, which gives pages back from the ends of its heaps only; 0 where malloc does
            not tell.
    """

    resident: int
    kept: int

    @property
    def needed(self) -> int:
        """In use by malloc's callers, or outside of malloc."""
        return self.resident - self.kept


def measure_memory() -> ProcessMemory:
    """Of this process."""
    kept = 0
    if hasattr(libc := ctypes.CDLL(None), "mallinfo2"):  # not on macOS, nor with musl
        libc.mallinfo2.restype = _Mallinfo2
        kept = libc.mallinfo2().fordblks
    return ProcessMemory(_measure_resident(), kept)


def find_growth(samples: Sequence[tuple[float, int]]) -> float:
    """How much the bytes of (seconds, bytes) grow over the last half of the samples, as a share of their mean.

    The slope is that of the lowest samples of short windows: buffers that MLX and malloc keep for a while come and go.
    """
    half = samples[len(samples) // 2 :]
    windows = np.array_split(np.array(half, dtype=float), min(WINDOWS, len(half)))
    seconds, floors = np.array([window[window[:, 1].argmin()] for window in windows]).T
    return np.polyfit(seconds, floors, 1)[0] * (seconds[-1] - seconds[0]) / floors.mean()


def _measure_resident() -> int:
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024
