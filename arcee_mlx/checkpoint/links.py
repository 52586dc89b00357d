"""Which files of a checkpoint folder may be links: to their own like and to a hub cache's blobs, and to nothing private.

Whatever a link leads to would be copied into the converted folder, and uploaded with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from ..errors import CheckpointError
from ..model.json_file import describe_kind
from .shards import INDEX_FILE, WEIGHTS_FILE, read_weight_map


def check_links(folder: Path) -> None:
    """Checks config, index and weights of a checkpoint, as far as they are there.

    Raises:
        CheckpointError: see `check_file`; or the index is damaged.
    """
    for name in ("config.json", WEIGHTS_FILE, INDEX_FILE):
        if os.path.lexists(folder / name):
            check_file(folder / name, folder)
    if not (folder / WEIGHTS_FILE).exists() and (folder / INDEX_FILE).exists():
        for name in dict.fromkeys(read_weight_map(folder).values()):
            if os.path.lexists(folder / name):
                check_file(folder / name, folder)


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Finds and checks the files of a folder whose names match; folders are passed over.

    Args:
        folder: of the checkpoint.
        patterns: as "LICENSE*", or with one folder, as "templates/*.jinja"; each part is matched by itself.

    Raises:
        CheckpointError: see `check_file`.
    """
    found: set[Path] = set()
    for pattern in patterns:
        place, last = (folder / pattern).parent, Path(pattern).name
        if not os.path.lexists(place):
            continue
        try:
            found |= {place / name for name in os.listdir(place) if fnmatchcase(name, last)}
        except OSError as error:
            raise CheckpointError(
                f"{place}: cannot be listed ({error.strerror}); expected a folder; put the folder itself there"
            ) from error
    files = sorted(path for path in found if path.is_symlink() or not path.is_dir())
    for path in files:
        check_file(path, folder)
    return files


def check_file(path: Path, folder: Path) -> None:
    """Checks that a file of a checkpoint is one, or a link to what may stand for it.

    A link, and each further one on its way, may lead to a file of the same name (weights on another disk), to one
    inside the checkpoint's folder, or to a blob of a hub cache, where snapshots are links to files named by their hash.

    Raises:
        CheckpointError: it leads to nothing, to what is no regular file, or to a file of another name elsewhere.
    """
    try:
        problem = describe_kind(path.stat().st_mode)
        if not problem and not os.access(path, os.R_OK):
            problem = "not readable"
    except FileNotFoundError:
        problem = "not there"
    except OSError as error:  # a circle of links, or a folder that may not be entered
        problem = f"out of reach ({error.strerror})"
    if problem:
        leads = f"is a link to {os.path.realpath(path)}, which " if path.is_symlink() else ""
        raise CheckpointError(f"{path}: {leads}is {problem}; expected a readable file; put the file itself there")
    for start in (path, *(parent for parent in path.parents if folder in parent.parents)):
        link = start
        while link.is_symlink():
            target = link.parent.resolve() / os.readlink(link)
            target = target.parent.resolve() / target.name
            inside = folder.resolve() in target.parents and target.name != ".."
            if not (target.name == start.name or inside or _is_blob(target)):
                raise CheckpointError(
                    f"{path}: is a link to {target}; expected the file itself, or a link to one named {start.name} or to "
                    f"a blob of a Hugging Face cache; put the file there if it belongs to the checkpoint"
                )
            link = target


def _is_blob(path: Path) -> bool:
    """Whether a file is one of a hub cache.

    Snapshots link to models--org--name/blobs/HASH beside them, which may itself be a link to blobs/HA/HASH that all
    models of the cache share (huggingface_hub 2, `utils/_shared_blobs.py`).
    """
    own, shared = path.parent, path.parent.parent
    return (own.name == "blobs" and (own.parent / "snapshots").is_dir()) or (
        shared.name == "blobs" and (shared / ".huggingface-shared-blobs").is_file()
    )
