"""Files of a program's own state: safetensors with a checksum over every byte, written whole or not at all.

The file begins with the checksum, so that damage is found before anything else of it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, InputError
from ..model.json_file import open_regular, parse_object
from .files import TensorEntry, TensorWriter, read_table, sync_file, sync_folder

_BEGINNING = b'{"__metadata__":{"sha256":"'  # of every such file, behind the length of the header
_DIGEST = slice(8 + len(_BEGINNING), 8 + len(_BEGINNING) + 64)
_BLOCK_BYTES = 2**20


@contextlib.contextmanager
def new_sealed_file(
    path: Path, kind: str, content: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> Iterator[TensorWriter]:
    """A writer of a file that takes the name `path`, and an older one's place, when the block ends without an error.

    Args:
        kind: what the file is, such as "session".
        content: in JSON values.
        tensors: name -> (safetensors dtype, shape); the block writes them.

    Raises:
        InputError: the file cannot be written.
        TypeError: the content is no JSON.
    """
    unfinished = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        writer = TensorWriter(unfinished, tensors, metadata={"sha256": "0" * 64, kind: json.dumps(content)})
        try:
            yield writer
            writer.close()
        finally:
            writer.abort()
        _seal(unfinished)
        os.replace(unfinished, path)
        sync_folder(path.parent)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}); expected a folder to write to; check space and rights"
        ) from error
    finally:
        unfinished.unlink(missing_ok=True)


def read_sealed_file(path: Path, kind: str, maker: str) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """The content of a file and the table of its tensors, if its checksum is right.

    Args:
        kind: as it was written with.
        maker: what writes such files, for errors.

    Raises:
        InputError: there is no such file, it is damaged, or it is another kind's.
    """
    try:
        with open_regular(path) as file:
            head = file.read(_DIGEST.stop)
            if head[8 : _DIGEST.start] != _BEGINNING:
                raise InputError(f"{path}: is no {kind}'s file, or damaged; expected one of {maker}; name that")
            if _compute_digest(file) != head[_DIGEST]:
                raise InputError(
                    f"{path}: is damaged: its checksum is another; expected it as saved; take a copy of it"
                )
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            table = parse_object(file.read(length))
            size = os.fstat(file.fileno()).st_size
        entries = read_table(path, table, 8 + length, size)
        if kind not in table["__metadata__"]:
            raise InputError(f"{path}: is no {kind}'s file; expected one of {maker}; name that")
        return dict(parse_object(table["__metadata__"][kind].encode())), entries
    except FileNotFoundError:
        raise InputError(f"{path}: does not exist; expected a file of {maker}; check the path") from None
    except InputError:
        raise
    except (OSError, CheckpointError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a file of {maker}; check the path") from error


def _seal(path: Path) -> None:
    """Writes the checksum of the whole file, its own place taken as zeros, into it."""
    with open(path, "r+b") as file:
        digest = _compute_digest(file)
        file.seek(_DIGEST.start)
        file.write(digest)
        file.flush()
        sync_file(file.fileno())


def _compute_digest(file: BinaryIO) -> bytes:
    file.seek(0)
    head = file.read(_DIGEST.stop)
    digest = hashlib.sha256(head[: _DIGEST.start] + b"0" * 64)
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest().encode()
