"""The table of contents of a safetensors file, checked against the file's size before anything of it is trusted."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError
from ..model.json_file import MAX_JSON_BYTES, open_regular, parse_object

# safetensors' name -> MLX's dtype, and the numpy dtype its bytes are read as.
DTYPES: dict[str, tuple[mx.Dtype, str]] = {
    "F32": (mx.float32, "<f4"),
    "F16": (mx.float16, "<f2"),
    "BF16": (mx.bfloat16, "<u2"),
    "U32": (mx.uint32, "<u4"),
    "U8": (mx.uint8, "u1"),
}
_MAX_DIMENSIONS, _MAX_LENGTH = 8, 2**31 - 1  # the second is an MLX array's own
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
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON_BYTES):
                raise CheckpointError(f"{path}: is {size} bytes and no whole safetensors file; download it again")
            text = file.read(length)
        if not text.startswith(b"{"):
            raise ValueError(f"it begins with {text[:8]!r} instead of an object")
        table = parse_object(text)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a shard of this checkpoint; download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); download it again") from error
    return read_table(path, table, 8 + length, size)


def read_table(path: Path, table: Mapping[str, Any], data_start: int, size: int) -> dict[str, TensorEntry]:
    """Checks a safetensors file's parsed table against its `size`; the file at `path` need not be here.

    Raises:
        CheckpointError: the table is damaged or does not cover the file, or a dtype is not supported.
    """
    metadata = {} if table.get("__metadata__") is None else table["__metadata__"]
    if not (isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())):
        raise CheckpointError(f"{path}: its __metadata__ is damaged; expected names and texts; download it again")
    try:
        "".join([*table, *metadata, *metadata.values()]).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(f"{path}: its header is damaged ({error}); download it again") from None
    entries = [_read_entry(path, name, value, data_start) for name, value in table.items() if name != "__metadata__"]
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
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        whole = len(value) == 3 and isinstance(dtype, str)
        whole = whole and all(isinstance(part, list | tuple) for part in (shape, offsets))
        # A boolean is an integer to Python, and no reader's shape or offset.
        whole = whole and all(type(n) is int and n >= 0 for n in (*shape, *offsets))
        whole = whole and len(offsets) == 2 and offsets[0] <= offsets[1]
    except (TypeError, KeyError):
        whole = False
    if not whole:
        raise CheckpointError(f"{path}: its entry for {name!r} is damaged; download the file again")
    if len(shape) > _MAX_DIMENSIONS or any(n > _MAX_LENGTH for n in shape):
        raise CheckpointError(
            f"{path}: {name!r} has shape {str(shape)[:100]}; expected at most {_MAX_DIMENSIONS} dimensions, each of at most "
            f"{_MAX_LENGTH}; download it again"
        )
    start, end = offsets
    if dtype in DTYPES:
        needed = math.prod(shape) * DTYPES[dtype][0].size
        if end - start != needed:
            raise CheckpointError(
                f"{path}: {name!r} has {end - start} bytes; expected {needed} for {dtype} of shape {tuple(shape)}; "
                f"download it again"
            )
    elif not name.endswith("rotary_emb.inv_freq"):  # a table that old files have and nobody reads
        raise CheckpointError(f"{path}: {name!r} has dtype {ascii(dtype)[1:-1]}; expected one of {', '.join(DTYPES)}")
    return TensorEntry(name, dtype, tuple(shape), path, data_start + start, data_start + end)
