"""The end of the program waits for threads that computed to be really gone, since MLX would crash it otherwise.

MLX's thread-local objects take Python's lock when their thread ends, which is after `Thread.join` has returned. If Python
is going away by then, the process aborts: "terminate called without an active exception" (mlx 0.32.4, Python 3.11).
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time

_PATIENCE_S = 2.0  # it takes microseconds
_threads: dict[int, threading.Thread] = {}  # by native id, which the operating system may give again
_lock = threading.Lock()


def wait_for_this_thread_at_exit() -> None:
    """To be called by whatever computes; costs a dictionary look-up from the second time on."""
    thread = threading.current_thread()
    native_id = thread.native_id
    if thread is threading.main_thread() or native_id is None or _threads.get(native_id) is thread:
        return
    with _lock:
        for gone in [each for each in _threads.items() if not _is_there(*each)]:
            del _threads[gone[0]]
        _threads[native_id] = thread


@atexit.register
def wait_for_ended_threads() -> None:
    """Returns when no thread that has ended for Python is still there for the operating system."""
    until_s = time.monotonic() + _PATIENCE_S
    for native_id, thread in list(_threads.items()):
        while not thread.is_alive() and _is_there(native_id, thread) and time.monotonic() < until_s:
            time.sleep(0.0005)


def _is_there(native_id: int, thread: threading.Thread) -> bool:
    if sys.platform == "linux":
        return os.path.exists(f"/proc/self/task/{native_id}")
    assert thread.ident is not None
    try:
        signal.pthread_kill(thread.ident, 0)  # on macOS safe for a thread that is gone
    except ProcessLookupError:
        return False
    return True
