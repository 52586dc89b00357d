"""Where and with what a benchmark ran: without that its numbers mean nothing."""

from __future__ import annotations

import platform
from datetime import date
from importlib.metadata import version

import mlx.core as mx


def describe_machine() -> dict[str, str]:
    """Today's date, the platform, MLX's default device, and the versions of mlx and mlx_lm."""
    return {
        "date": str(date.today()),
        "platform": platform.platform(),
        "device": str(mx.default_device()),
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
    }
