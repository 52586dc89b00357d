"""The one owner of the on-disk format: row slices, shards, atomic writing; the headers are read in headers.py.

Only safetensors are read. A file is looked at through its header before anything of it is trusted; tensors are then
read lazily (`Checkpoint.arrays`) or in row slices (`read_rows`), which need the memory of the slice only: `mx.load`
reads a whole tensor for ten rows of it, and mapped pages count as memory too.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, InputError
from .headers import DTYPES as DTYPES
from .headers import FLOATS as FLOATS
from .headers import TensorEntry as TensorEntry
from .headers import read_header as read_header
from .headers import read_table as read_table
from .shards import INDEX_FILE, WEIGHTS_FILE, explain_no_weights, find_disagreements, read_weight_map

SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder's tensors by name, over all shards; made by `open_checkpoint`."""

    folder: Path
    entries: Mapping[str, TensorEntry]

    @property
    def files(self) -> list[Path]:
        """The shards, in the order of their first tensor."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    def arrays(self) -> dict[str, mx.array]:
        """All tensors as lazy MLX arrays: a tensor is read when it is first computed with, and never otherwise."""
        arrays: dict[str, mx.array] = {}
        for file in self.files:
            entries = {name: entry for name, entry in self.entries.items() if entry.file == file}
            if all(entry.dtype in DTYPES for entry in entries.values()):
                loaded = mx.load(str(file), format="safetensors")
                assert isinstance(loaded, dict)
                arrays |= {name: loaded[name] for name in entries}
            else:  # a stale table in float64: MLX refuses the whole file for it
                arrays |= {n: read_rows(e, 0, e.shape[0]) for n, e in entries.items() if e.dtype in DTYPES}
        return arrays


def open_checkpoint(folder: Path) -> Checkpoint:
    """Finds and checks the safetensors files of a folder, as transformers chooses them; reads no tensor.

    Raises:
        CheckpointError: no safetensors, a shard is missing or damaged, or the index names what it must not.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).exists():
        return Checkpoint(folder, read_header(folder / WEIGHTS_FILE))
    if not (folder / INDEX_FILE).exists():
        if folder.is_dir():
            raise CheckpointError(explain_no_weights(folder, [path.name for path in folder.iterdir()]))
        raise CheckpointError(f"{folder}: no such folder; expected a checkpoint folder; check the path")
    weight_map = read_weight_map(folder)
    headers = {name: read_header(folder / name) for name in dict.fromkeys(weight_map.values())}
    for problem in find_disagreements(folder, weight_map, headers):
        raise CheckpointError(problem)
    return Checkpoint(folder, {tensor: headers[name][tensor] for tensor, name in weight_map.items()})


def read_rows(entry: TensorEntry, start: int, stop: int) -> mx.array:
    """Reads rows [start, stop) of a tensor's first dimension, and nothing else of the file.

    Returns:
        array of shape (stop - start, *entry.shape[1:]) in the file's dtype.

    Raises:
        InputError: there are no such rows.
        CheckpointError: the file ended early or could not be read.
    """
    count = entry.shape[0] if entry.shape else 0
    if not 0 <= start <= stop <= count:
        raise InputError(f"rows {start} to {stop} of {entry.name!r}; expected a range within its {count} rows")
    dtype, storage = DTYPES[entry.dtype]
    row_bytes = entry.nbytes // count if count else 0
    data = _read_bytes(entry, start * row_bytes, stop * row_bytes)
    rows = mx.array(data.view(storage).reshape(stop - start, *entry.shape[1:]))
    return rows.view(dtype) if rows.dtype != dtype else rows


def read_columns(entry: TensorEntry, start: int, stop: int) -> mx.array:
    """Reads columns [start, stop) of a matrix, and nothing else of the file, and transposes them.

    Returns:
        array of shape (stop - start, entry.shape[0]) in the file's dtype.

    Raises:
        InputError: there are no such columns.
        CheckpointError: the file ended early or could not be read.
    """
    rows, columns = entry.shape
    if not 0 <= start <= stop <= columns:
        raise InputError(f"columns {start} to {stop} of {entry.name!r}; expected a range within its {columns} columns")
    dtype, storage = DTYPES[entry.dtype]
    width = dtype.size
    pieces = [(row * columns + start) * width for row in range(rows)]
    data = _read_pieces(entry, pieces, (stop - start) * width)
    values = mx.array(np.ascontiguousarray(data.view(storage).reshape(rows, stop - start).T))
    return values.view(dtype) if values.dtype != dtype else values


def same_content(a: TensorEntry, b: TensorEntry) -> bool:
    """Whether two tensors are equal to the bit; reads slices and stops at the first difference."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    ranges = ((start, min(start + 2**24, a.nbytes)) for start in range(0, a.nbytes, 2**24))
    return all(np.array_equal(_read_bytes(a, *part), _read_bytes(b, *part)) for part in ranges)


def _read_bytes(entry: TensorEntry, start: int, stop: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Reads bytes [start, stop) of a tensor."""
    return _read_pieces(entry, [start], stop - start)


def _read_pieces(entry: TensorEntry, starts: Sequence[int], size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Reads `size` bytes from each of some offsets in a tensor, one after the other."""
    buffer = np.empty(len(starts) * size, np.uint8)
    try:
        with open(entry.file, "rb", buffering=0) as file:
            for i, start in enumerate(starts):
                view, done = buffer[i * size : (i + 1) * size].data, 0
                file.seek(entry.start + start)
                while done < size and (count := file.readinto(view[done:])):
                    done += count
                if done < size:
                    raise CheckpointError(f"{entry.file}: ends inside {entry.name!r}; download it again")
    except OSError as error:
        raise CheckpointError(
            f"{entry.file}: cannot read {entry.name!r} ({error.strerror}); check the disk and try again"
        ) from error
    return buffer


class TensorWriter:
    """Writes one safetensors file whose tensors' shapes are known before their values.

    Bytes go to their final place as they are made, in any order; `close` checks nothing is missing and syncs to disk.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        finished: Collection[str] = (),
        *,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Begins a file, or goes on with it.

        Args:
            path: of the file.
            tensors: name -> (safetensors dtype, shape), in the order they are to lie.
            finished: tensors that an earlier writer of the same file has written.
            metadata: names and texts, which the file begins with, in their order.

        Raises:
            CheckpointError: there are such tensors, but the file is not there or has another size.
        """
        header: dict[str, Any] = {"__metadata__": {**(metadata or {}), "format": "mlx"}}
        offset = 0
        self._sizes: dict[str, int] = {}
        for name, (dtype, shape) in tensors.items():
            nbytes = math.prod(shape) * DTYPES[dtype][0].size
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
            self._sizes[name] = nbytes
            offset += nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._starts = {name: 8 + len(encoded) + header[name]["data_offsets"][0] for name in tensors}
        self._written = {name: size if name in finished else 0 for name, size in self._sizes.items()}
        self._path = path
        nbytes = 8 + len(encoded) + offset
        if finished and not (path.is_file() and path.stat().st_size == nbytes):
            raise CheckpointError(f"{path}: is not the file that was begun; expected {nbytes} bytes; start over")
        self._file = open(path, "r+b" if finished else "wb", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self._write_at(0, len(encoded).to_bytes(8, "little") + encoded)
            self._file.truncate(nbytes)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, values: mx.array) -> None:
        """Appends rows to a tensor: successive calls fill it from the front."""
        data = np.ascontiguousarray(_as_numpy(values)).reshape(-1).view(np.uint8).data
        self._write_at(self._starts[name] + self._written[name], data)
        self._written[name] += len(data)

    def is_complete(self, name: str) -> bool:
        """Whether all rows of a tensor are written."""
        return self._written[name] == self._sizes[name]

    def sync(self) -> None:
        """Makes what was written lasting."""
        sync_file(self._file.fileno())

    def close(self) -> None:
        """Syncs the file; raises CheckpointError if a tensor is not complete."""
        for name, size in self._sizes.items():
            if not self.is_complete(name):
                raise CheckpointError(f"{self._path}: {name!r} has {self._written[name]} bytes; expected {size}")
        self.sync()
        self._file.close()

    def abort(self) -> None:
        """Closes the file as it is."""
        self._file.close()

    def _write_at(self, position: int, data: bytes | memoryview) -> None:
        """Writes all of it: a disk that fills up takes a part first and says so only after."""
        left = memoryview(data)
        while left:
            count = os.pwrite(self._file.fileno(), left, position)
            position += count
            left = left[count:]


def plan_shards(sizes: Mapping[str, int], shard_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """File name -> tensor names, in order, each file at most `shard_bytes` (or one tensor)."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, nbytes in sizes.items():
        if shards[-1] and used + nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, start=1)}


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total_bytes: int) -> None:
    """Writes model.safetensors.index.json as transformers and mlx-lm read it."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    values = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON as transformers does (2 spaces, newline at the end) and syncs it."""
    # Half a surrogate pair cannot be UTF-8: it becomes an escape, which is JSON's own.
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        json.dump(values, file, indent=2, ensure_ascii=False)
        file.write("\n")
        file.flush()
        sync_file(file.fileno())


def write_tensors(folder: Path, tensors: Mapping[str, mx.array]) -> None:
    """Writes arrays in shards with an index, evaluating one at a time."""
    sizes = {name: value.nbytes for name, value in tensors.items()}
    shards = plan_shards(sizes)
    for file, names in shards.items():
        table = {name: (DTYPE_NAMES[tensors[name].dtype], tuple(tensors[name].shape)) for name in names}
        writer = TensorWriter(folder / file, table)
        try:
            for name in names:
                writer.write(name, tensors[name])
            writer.close()
        finally:
            writer.abort()
    write_index(folder, shards, sum(sizes.values()))


@contextlib.contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling that takes the name `path` only when the block ends without an error.

    Raises:
        InputError: the path exists and may not be overwritten, or is not a checkpoint folder.
    """
    path = Path(path).expanduser().absolute()
    check_target(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield partial
        publish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Raises InputError unless a checkpoint may be written to `path`."""
    if not path.exists() and not path.is_symlink():
        return
    if not overwrite:
        raise InputError(f"{path}: exists already; expected a new folder; name another one, or ask to overwrite it")
    if path.is_symlink() or not path.is_dir() or (any(path.iterdir()) and not (path / "config.json").exists()):
        raise InputError(f"{path}: is no checkpoint folder and is not overwritten; name another folder")


def publish_folder(partial: Path, path: Path) -> None:
    """Syncs a finished folder and gives it its name; an older one of that name goes only after."""
    for folder in (partial, path.parent):
        sync_folder(folder)
    partial.chmod(0o777 & ~_umask())
    if path.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
        os.replace(path, old / path.name)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, path)
    sync_folder(path.parent)


def _as_numpy(values: mx.array) -> np.ndarray:
    # numpy has no bfloat16: its bytes travel as uint16.
    return np.array(values.view(mx.uint16) if values.dtype == mx.bfloat16 else values, copy=False)


def sync_file(descriptor: int) -> None:
    """Makes what was written to an open file lasting, past the drive's own cache, too."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS, whose fsync ends at the drive's cache
        with contextlib.suppress(OSError):  # not on every file system
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder lasting."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_file(descriptor)
    except OSError as error:
        if error.errno not in (
            errno.EBADF,
            errno.EINVAL,
            errno.ENOTSUP,
        ):  # not every file system can, as PostgreSQL notes
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
