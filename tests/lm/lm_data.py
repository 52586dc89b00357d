"""What the tests of arcee_mlx.lm share: data sets, a home with calibration text, free ports, child processes."""

from __future__ import annotations

import json
import os
import socket
from contextlib import ExitStack
from pathlib import Path

from conftest import TEXT


def write_data(folder: Path, rows: int = 4) -> Path:
    """A data set as mlx-lm reads one: train, valid and test.jsonl."""
    folder.mkdir()
    for split in ("train", "valid", "test"):
        lines = [json.dumps({"text": f"{split} {i}: {TEXT}"}) for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


def write_home(folder: Path) -> Path:
    """A home folder with the calibration text where mlx-lm would otherwise download it to, and an empty hub cache."""
    (folder / ".cache" / "mlx-lm").mkdir(parents=True)
    (folder / ".cache" / "mlx-lm" / "calibration_v5.txt").write_text(TEXT * 10)
    (folder / ".cache" / "huggingface" / "hub").mkdir(parents=True)
    return folder


def free_ports(count: int) -> list[int]:
    """TCP ports on this machine that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def child_environment(**values: str) -> dict[str, str]:
    """This process's environment, offline, for a child that imports the same arcee_mlx."""
    root = str(Path(__file__).parents[2])
    return dict(os.environ) | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": root} | values
