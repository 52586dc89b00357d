"""A JSON object from a file of a checkpoint, read so that a damaged or hostile file is an error and never a hang."""

from __future__ import annotations

import json
import math
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError

MAX_JSON_BYTES = 100_000_000  # safetensors' own limit of a header; a config has a few kilobytes
_MAX_DEPTH = 50  # Python's recursion ends at some hundreds, and what is read here is written and walked again
_SPECIAL_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a checkpoint.

    Raises:
        CheckpointError: the file is missing, no regular file, unreadable, not JSON, or not an object.
    """
    try:
        with open_regular(path) as file:
            values = parse_object(file.read(MAX_JSON_BYTES + 1))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file; expected a checkpoint folder with {path.name}; check the path, or download it again"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); expected JSON; download the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}; expected a JSON object; download it again")
    return values


def open_regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading. Anything else is not even opened: a pipe waits, and a device need not end.

    Raises:
        CheckpointError: it is a folder, a pipe, a socket or a device.
        OSError: it is not there or cannot be opened.
    """
    if kind := describe_kind(os.stat(path).st_mode):
        raise CheckpointError(f"{path}: cannot be read (it is {kind}); expected a file; download it again")
    return open(path, "rb")


def describe_kind(mode: int) -> str:
    """What something that is no regular file is, by its `st_mode`; "" for a regular file."""
    return "" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a device")


def parse_object(text: bytes) -> Any:
    """Parses JSON in which no object has a key twice.

    Of two values for one key, readers take different ones: what one of them checked, another would use.

    Raises:
        ValueError: it is too long or too deep, not UTF-8, not JSON, or has a key twice.
    """
    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes")
    try:
        values = json.loads(text.decode("utf-8"), object_pairs_hook=_refuse_duplicates)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level, depth = [values], 0
    while level := [child for value in level for child in _children(value)]:
        if (depth := depth + 1) > _MAX_DEPTH:
            raise ValueError("nested too deeply")
    return values


def shorten(value: Any) -> str:
    """A value from a file as an error shows it: whole, or its beginning."""
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def decode_special_floats(value: Any) -> Any:
    """Reads transformers 5's `{"__float__": "Infinity"}` objects back as floats."""
    if isinstance(value, dict):
        if set(value) == {"__float__"} and (name := str(value["__float__"])) in _SPECIAL_FLOATS:
            return _SPECIAL_FLOATS[name]
        return {key: decode_special_floats(item) for key, item in value.items()}
    return [decode_special_floats(item) for item in value] if isinstance(value, list) else value


def encode_special_floats(value: Any) -> Any:
    """Writes infinities and NaN, which JSON does not have, as transformers 5 does."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: encode_special_floats(item) for key, item in value.items()}
    return [encode_special_floats(item) for item in value] if isinstance(value, list) else value


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} twice")
    return values


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
