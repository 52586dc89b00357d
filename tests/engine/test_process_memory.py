"""The soak's measure of memory: what is freed is not needed, whatever malloc keeps; what leaks is."""

from __future__ import annotations

import ctypes
import sys

import numpy as np
import pytest

from process_memory import find_growth, measure_memory

BLOCK, BLOCKS = 64 << 10, 1024  # below what glibc maps on its own and gives back at once


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="malloc does not tell what it keeps"
)
def test_freed_memory_that_malloc_keeps_is_not_needed() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    before = measure_memory()
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    pin = libc.malloc(BLOCK)  # behind them: the heap cannot shrink
    full = measure_memory()
    for block in blocks:
        libc.free(block)
    freed = measure_memory()
    libc.free(pin)
    everything, slack = BLOCK * BLOCKS, 4 << 20
    assert full.needed - before.needed > everything - slack
    assert full.resident - freed.resident < slack
    assert freed.needed - before.needed < slack


def test_growth_is_that_of_the_floors_over_the_last_half() -> None:
    random = np.random.default_rng(0)
    seconds = np.arange(0.0, 400.0, 0.5)
    bursts = (random.random(800) < 0.7) * random.random(800) * 50e6
    flat = np.where(seconds < 100, seconds, 100) * 1e6 + 200e6  # all its growth is in the first half
    leak = np.clip(seconds - 200, 0, None) / 200 * 6e6
    assert abs(find_growth(list(zip(seconds, flat + bursts, strict=True)))) < 0.003
    assert find_growth(list(zip(seconds, flat + bursts + leak, strict=True))) == pytest.approx(0.02, abs=0.003)


def test_the_resident_memory_is_this_processs() -> None:
    before = measure_memory().resident
    held = np.ones(64 << 20, dtype=np.uint8)
    assert held[::4096].all() and 60 << 20 < measure_memory().resident - before < 80 << 20
