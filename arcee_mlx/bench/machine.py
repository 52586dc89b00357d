"""Where and with what a benchmark ran: without that its numbers mean nothing."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import version

import mlx.core as mx

from ..model.linear import has_fast_blas


def describe_machine() -> dict[str, str]:
    """Today's date, the platform, the chip, memory, MLX's default device, the BLAS of its CPU backend, and versions."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": str(date.today()),
        "platform": platform.platform(),
        "chip": str(mx.device_info().get("device_name", "unknown")),
        "memory": f"{memory_bytes / 2**30:.0f} GiB",
        "device": str(mx.default_device()),
        "blas": "preloaded" if has_fast_blas() else "MLX's",
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
