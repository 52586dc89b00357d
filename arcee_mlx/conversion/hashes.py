"""FileHasher: SHA-256 of files, computed in a thread of its own while a conversion goes on."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import CheckpointError

_CHUNK_BYTES = 2**22


class FileHasher:
    """Hashes files one after the other; leaving its `with` block ends it, at once if something failed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "arcee_mlx-hash")
        self._stop = threading.Event()
        self._digests: dict[str, Future[str]] = {}

    def add(self, paths: Iterable[Path]) -> None:
        """Files to be hashed from now on; their names must differ."""
        for path in paths:
            self._digests[path.name] = self._pool.submit(self._hash, path)

    def digests(self) -> dict[str, str]:
        """File name -> hexadecimal SHA-256 of all files added since the last call; waits for them.

        Raises:
            CheckpointError: a file cannot be read.
        """
        digests, self._digests = {name: future.result() for name, future in self._digests.items()}, {}
        return digests

    def _hash(self, path: Path) -> str:
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while not self._stop.is_set() and (chunk := file.read(_CHUNK_BYTES)):
                    digest.update(chunk)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
        return digest.hexdigest()

    def __enter__(self) -> FileHasher:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)
