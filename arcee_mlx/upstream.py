"""The one door to mlx_lm: imported on first use, with what it would change in the process held off.

Importing mlx_lm takes over a second, loads transformers, sets an environment variable and lowers the process's HARD
limit of open files, which a normal user cannot raise again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import resource
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import mlx.core as mx

_lock = threading.Lock()


@functools.cache  # attention over a quantized cache asks for every layer and token
def mlx_lm_module(name: str) -> ModuleType:
    """Imports `mlx_lm.<name>`, e.g. "models.cache", leaving limits and environment as they were.

    Thread-safe. Only the importing thread's calls of `resource.setrlimit` are held off, and only during the import.
    """
    with _lock:
        importer, setrlimit = threading.get_ident(), resource.setrlimit
        variable = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
        before = os.environ.get(variable)

        def hold_off(which: int, limits: Any) -> None:
            if threading.get_ident() != importer:
                setrlimit(which, limits)

        resource.setrlimit = hold_off
        try:
            _import_thread_pools()
            return importlib.import_module(f"mlx_lm.{name}")
        finally:
            resource.setrlimit = setrlimit
            if before is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = before


def _import_thread_pools() -> None:
    """Which transformers imports, and which cannot be imported any more when the main thread has ended before others."""
    try:
        importlib.import_module("concurrent.futures.thread")
    except RuntimeError:
        register = threading._register_atexit  # type: ignore[attr-defined]
        threading._register_atexit = lambda *_args, **_kwargs: None  # type: ignore[attr-defined]
        try:
            importlib.import_module("concurrent.futures.thread")
        finally:
            threading._register_atexit = register  # type: ignore[attr-defined]


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Puts MLX's global random state back, from which every new layer draws, mlx's and mlx_lm's."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)
