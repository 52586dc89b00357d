"""The table of contents of a safetensors file, checked against the file's size before anything of it is trusted."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000
# safetensors' name -> MLX's dtype, and the numpy dtype its bytes are read as.
DTYPES: dict[str, tuple[mx.Dtype, str]] = {
    "F32": (mx.float32, "<f4"),
    "F16": (mx.float16, "<f2"),
    "BF16": (mx.bfloat16, "<u2"),
    "U32": (mx.uint32, "<u4"),
    "U8": (mx.uint8, "u1"),
}
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `start` and `end` are byte offsets in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Reads the table of contents of a safetensors file and checks it against the file's size.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or holds a dtype that is not supported.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{path}: is {size} bytes and no whole safetensors file; download it again")
            table = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a shard of this checkpoint; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the permissions") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); download it again") from error
    return read_table(path, table, 8 + length, size)


def read_table(path: Path, table: Any, data_start: int, size: int) -> dict[str, TensorEntry]:
    """Checks a safetensors file's parsed table against its `size`; the file at `path` need not be here.

    Raises:
        CheckpointError: the table is damaged or does not cover the file, or a dtype is not supported.
    """
    entries = [
        _read_entry(path, name, value, data_start)
        for name, value in (table.items() if isinstance(table, dict) else ())
        if name != "__metadata__"
    ]
    expected = data_start
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != expected:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} starts at byte {entry.start}; expected {expected}; download it again"
            )
        expected = entry.end
    if expected != size:
        raise CheckpointError(f"{path}: is {size} bytes; expected {expected} by its header; download it again")
    return {entry.name: entry for entry in entries}


def _read_entry(path: Path, name: str, value: Any, data_start: int) -> TensorEntry:
    try:
        dtype, shape, (start, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, start, end)) and start <= end
        whole = whole and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        whole, dtype, shape, start, end = False, "", (), 0, 0
    if not whole:
        raise CheckpointError(f"{path}: its entry for {name!r} is damaged; download the file again")
    if name.endswith("rotary_emb.inv_freq"):
        return TensorEntry(name, dtype, shape, path, data_start + start, data_start + end)
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name!r} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
    if end - start != math.prod(shape) * DTYPES[dtype][0].size:
        raise CheckpointError(
            f"{path}: {name!r} has {end - start} bytes; its shape {shape} and {dtype} need another number"
        )
    return TensorEntry(name, dtype, shape, path, data_start + start, data_start + end)
