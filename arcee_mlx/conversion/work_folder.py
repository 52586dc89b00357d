"""WorkFolder: the hidden sibling a conversion is made in: one process at a time, and kept for the next where it stops.

`.NAME.partial/` holds `model/`, which is renamed to NAME when it is complete, and a journal: a line saying what is
being made, then one for each finished tensor, written only after that tensor's bytes are safe on disk.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.files import check_target, sync_file, sync_folder
from ..errors import ConversionError

# As much work as a loss of power can undo; a killed process loses what it had not handed to the system.
COMMIT_EVERY_S = 2.0


class WorkFolder:
    """A folder in which a conversion is made; from `open_work_folder`.

    Attributes:
        model: the folder that gets the final name.
        finished: what the journal says of finished tensors, by name, from this run and those before it.
        resumed: whether an earlier run left work to go on with.
    """

    def __init__(self, folder: Path, target: Path, finished: dict[str, Mapping[str, Any]]) -> None:
        self.model = folder / "model"
        self.finished = finished
        self.resumed = bool(finished)
        self._folder, self._target = folder, target
        self._journal = open(folder / "journal", "ab")  # noqa: SIM115 - closed by close()
        self._waiting: dict[str, Mapping[str, Any]] = {}
        self._committed_s = time.monotonic()

    def finish(self, name: str, facts: Mapping[str, Any], sync: Callable[[], None]) -> None:
        """Notes that a tensor is written; every two seconds what was noted becomes lasting.

        Args:
            name: of the tensor.
            facts: what is known of it, as JSON holds it.
            sync: called first, to make its bytes lasting.
        """
        self._waiting[name] = facts
        if time.monotonic() - self._committed_s >= COMMIT_EVERY_S:
            self.commit(sync)

    def commit(self, sync: Callable[[], None]) -> None:
        """Makes all that was noted lasting: the bytes, then the journal."""
        if self._waiting:
            sync()
            lines = [json.dumps([name, facts], separators=(",", ":")) for name, facts in self._waiting.items()]
            self._journal.write("".join(f"{line}\n" for line in lines).encode())
            self._journal.flush()
            sync_file(self._journal.fileno())
            self.finished |= self._waiting
            self._waiting.clear()
        self._committed_s = time.monotonic()

    def publish(self) -> None:
        """Gives the finished model its name; an older one of that name goes only after."""
        sync_folder(self.model)
        if self._target.exists():
            os.replace(self._target, self._folder / "old")
        os.replace(self.model, self._target)
        sync_folder(self._target.parent)

    def close(self) -> None:
        """Closes the journal."""
        self._journal.close()


@contextlib.contextmanager
def open_work_folder(target: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[WorkFolder]:
    """Makes or finds the work folder of a conversion and holds it until the block ends.

    A block that ends with an OSError, a Ctrl-C or a kill leaves it for the next run with the same `identity`; any other
    error, and success, removes it.

    Args:
        target: the name that the finished model gets.
        identity: all that decides the result's bytes, as JSON holds it.
        overwrite: whether `target` may be replaced; then unfinished work of another identity is thrown away, too.

    Raises:
        InputError: `target` exists and may not be overwritten.
        ConversionError: another process is at it, or unfinished work of another identity lies there.
    """
    folder = target.parent / f".{target.name}.partial"
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder), _removed_if_empty(folder):
        if (folder / "old").exists() and not target.exists():  # a kill between the two renames of publish
            os.replace(folder / "old", target)
        check_target(target, overwrite=overwrite)
        encoded = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        begun = (folder / "model").is_dir() and (folder / "journal").exists()
        finished = _read_journal(folder / "journal", encoded) if begun else None
        if begun and finished is None and not overwrite:
            raise ConversionError(
                f"{folder}: holds an unfinished conversion of another source, recipe or version; expected none, or one "
                f"made with the same options; repeat that command to finish it, or give --force to throw it away"
            )
        if finished is None:
            _clear(folder)
            (folder / "model").mkdir()
            _write_journal(folder / "journal", encoded)
        work = WorkFolder(folder, target, finished or {})
        try:
            yield work
        except BaseException as error:
            work.close()
            if not (can_be_resumed(error) and work.finished):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        work.close()
        shutil.rmtree(folder, ignore_errors=True)


def can_be_resumed(error: BaseException) -> bool:
    """Whether a failure was the machine's or the user's choice, so that the same command may succeed later."""
    return isinstance(error, OSError | KeyboardInterrupt) or isinstance(error.__cause__, OSError)


def measure_disk(target: Path) -> int:
    """Bytes of disk that an unfinished conversion to `target` takes already."""
    files = (target.parent / f".{target.name}.partial" / "model").rglob("*")
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds a folder, which is made where it is not there, against other processes; a killed one lets go."""
    while True:
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the process that held it may have finished and removed it.
            if os.path.exists(folder) and os.path.samestat(os.fstat(descriptor), os.stat(folder)):
                break
        except BlockingIOError:
            os.close(descriptor)
            raise ConversionError(
                f"{folder}: another conversion is being written there; expected one at a time; wait for it, or name "
                f"another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _read_journal(path: Path, identity: str) -> dict[str, Mapping[str, Any]] | None:
    """Reads what is finished and cuts off a line that a kill left in the middle; None for another identity."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    first, *lines = whole.decode().splitlines()
    if first != identity:
        return None
    if whole != content:
        os.truncate(path, len(whole))
    return dict(json.loads(line) for line in lines)


def _write_journal(path: Path, identity: str) -> None:
    """Begins a journal; it is there only as a whole."""
    new = path.with_name("journal.new")
    with open(new, "wb") as file:
        file.write(f"{identity}\n".encode())
        file.flush()
        sync_file(file.fileno())
    os.replace(new, path)
    sync_folder(path.parent)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
