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
from ..errors import ConversionError, InputError

# As much work as a loss of power can undo; a killed process loses what it had not handed to the system.
COMMIT_EVERY_S = 2.0


class WorkFolder:
    """A folder in which a conversion is made; from `open_work_folder`.

    Attributes:
        model: the folder that gets the final name.
        finished: what the journal says of finished tensors, by name, from this run and those before it.
        resumed: whether an earlier run left work to go on with.
    """

    def __init__(self, folder: Path, target: Path, finished: dict[str, Mapping[str, Any]], *, overwrite: bool) -> None:
        self.model = folder / "model"
        self.finished = finished
        self.resumed = bool(finished)
        self._target, self._old, self._overwrite = target, folder / "old", overwrite
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
            try:
                sync()
                lines = [json.dumps([name, facts], separators=(",", ":")) for name, facts in self._waiting.items()]
                self._journal.write("".join(f"{line}\n" for line in lines).encode())
                self._journal.flush()
                sync_file(self._journal.fileno())
            except OSError:
                # The system drops what it could not write, and the next fsync would report success without it.
                self._waiting.clear()
                raise
            self.finished |= self._waiting
            self._waiting.clear()
        self._committed_s = time.monotonic()

    def publish(self) -> None:
        """Gives the finished model its name; an older one of that name goes only after.

        Raises:
            InputError: something has got that name meanwhile and may not be overwritten.
        """
        for folder in (self.model, *(path for path in self.model.rglob("*") if path.is_dir())):
            sync_folder(folder)
        check_target(self._target, overwrite=self._overwrite)
        if self._target.exists():
            shutil.rmtree(self._old, ignore_errors=True)
            os.replace(self._target, self._old)
        os.replace(self.model, self._target)
        with contextlib.suppress(OSError):  # it is complete and has its name, which only a loss of power could undo now
            sync_folder(self._target.parent)

    def close(self) -> None:
        """Closes the journal."""
        with contextlib.suppress(OSError):  # of lines that a full disk has refused already
            self._journal.close()


@contextlib.contextmanager
def open_work_folder(target: Path, identity: Mapping[str, Any], *, overwrite: bool = False) -> Iterator[WorkFolder]:
    """Makes or finds the work folder of a conversion and holds it until the block ends.

    A block that ends with a failure that `can_be_resumed`, or a kill, leaves it for the next run with the same
    `identity` if a tensor is finished; any other error, and success, removes it.

    Args:
        target: the name that the finished model gets.
        identity: all that decides the result's bytes, as JSON holds it.
        overwrite: whether `target` may be replaced; then unfinished work of another identity is thrown away, too.

    Raises:
        InputError: `target` exists and may not be overwritten.
        ConversionError: another process is at it, or unfinished work of another identity lies there.
    """
    folder = _place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder):
        _settle(folder, target)
        check_target(target, overwrite=overwrite)
        encoded = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        begun, finished = _read_journal(folder / "journal")
        if begun != encoded:
            if finished and not overwrite:
                raise ConversionError(
                    f"{folder}: holds an unfinished conversion of another source, recipe or version; expected none, or "
                    f"one made with the same options; repeat that command to finish it, or give --force to throw it away"
                )
            finished = {}
        try:
            if begun != encoded:
                _begin(folder, encoded)
            with contextlib.closing(WorkFolder(folder, target, finished, overwrite=overwrite)) as work:
                yield work
        except BaseException as error:
            _settle(folder, target)
            if not (can_be_resumed(error) and finished):  # to which the block has added its own
                _clear(folder)
            raise
        _clear(folder)


def can_be_resumed(error: BaseException) -> bool:
    """Whether a failure was the machine's or the user's choice, so that the same command may succeed later."""
    return isinstance(error, OSError | KeyboardInterrupt | InputError) or isinstance(error.__cause__, OSError)


def recover(target: Path) -> None:
    """Puts in order what a kill in the middle of publishing `target` left.

    Raises:
        ConversionError: another process is at it.
    """
    folder = _place(target)
    if folder.exists():
        with contextlib.suppress(OSError), _lock(folder):  # open_work_folder meets the same error, if it matters
            _settle(folder, target)


def measure_disk(target: Path) -> int:
    """Bytes of disk that an unfinished conversion to `target` takes already."""
    used = 0
    with contextlib.suppress(OSError):  # another process may be finishing it
        for path in (_place(target) / "model").rglob("*"):
            used += path.stat().st_blocks * 512 if path.is_file() else 0
    return used


def _place(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Holds a folder against other processes; a killed one lets go. It is made, and removed if it is empty at the end."""
    while True:
        folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # the process that held it has finished and removed it just now
            continue
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
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.close(descriptor)


def _settle(folder: Path, target: Path) -> None:
    """Puts in order what `publish` did not come to the end of.

    Before the new model has its name, the older one gets it back; after, nothing that is left is of use.
    """
    if not (folder / "model").is_dir():
        _clear(folder)
    elif (folder / "old").is_dir() and not target.exists():
        os.replace(folder / "old", target)


def _read_journal(path: Path) -> tuple[str, dict[str, Mapping[str, Any]]]:
    """Reads a journal up to a line that a kill or a damage left unreadable, and cuts it off there.

    Returns:
        the identity and what is finished by name; ("", {}) where there is no journal.
    """
    if not path.exists():
        return "", {}
    identity, *lines = path.read_bytes().splitlines(keepends=True) or [b""]
    finished: dict[str, Mapping[str, Any]] = {}
    length = len(identity)
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            name, facts = json.loads(line)
            finished[str(name)] = dict(facts)
        except (ValueError, TypeError):
            break
        length += len(line)
    os.truncate(path, length)
    return identity.decode(errors="replace").rstrip("\n"), finished


def _begin(folder: Path, identity: str) -> None:
    """Empties a folder and begins a journal, which is there only as a whole."""
    _clear(folder)
    (folder / "model").mkdir()
    with open(folder / "journal.new", "wb") as file:
        file.write(f"{identity}\n".encode())
        file.flush()
        sync_file(file.fileno())
    os.replace(folder / "journal.new", folder / "journal")
    sync_folder(folder)


def _clear(folder: Path) -> None:
    """Empties a folder, the journal first, which may never speak of bytes that are gone."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name != "journal"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
