"""A path or a Hugging Face Hub id becomes a local folder; only safetensors and small text files are ever fetched.

huggingface_hub does the work: cache, resume, login, offline mode, progress. It is imported for an id and never for a
folder. This file adds which files are wanted, whether a cached copy is whole, and errors that say what to do.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, HubError, InputError
from .hub_request import DOCUMENTS, INDEX, NEVER, TEMPLATES, Wanted, explain, find_outage, is_repo_id

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".npz", ".h5", ".msgpack", ".onnx")
_FILE_SUFFIXES = (*_WEIGHT_SUFFIXES, ".json", ".jinja", ".txt", ".pickle", ".pkl", ".zip", ".gz")
# A revision becomes part of a path in the cache: what git refuses in a name, and "..", is refused here too.
_REVISION = re.compile(r"(?!/)(?!.*\.\.)[^\x00-\x20\\~^:?*\[\x7f]+")

_logger = logging.getLogger("arcee_mlx")


def resolve_folder(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    weights: bool = True,
    adapter: bool = False,
    progress: bool = True,
) -> Path:
    """Return the local folder that holds a checkpoint or an adapter, downloading it if it is named by its hub id.

    Args:
        path_or_id: A folder (`~` is expanded) or a hub id, `name` or `org/name`. An existing folder wins; an
            `os.PathLike` and text that looks like a path are never taken for an id.
        revision: Branch, tag or full commit hash on the hub; None is the default branch. Not for a folder.
        weights: Fetch the safetensors too; False fetches the configuration, tokenizer and documents alone.
        adapter: It is an adapter that is wanted: its configuration and safetensors.
        progress: Show huggingface_hub's progress bars, if standard error is a terminal.

    Returns:
        The folder. That of an id is a snapshot in the hub's cache; its files may be links.

    Raises:
        InputError: `path_or_id` is neither a folder nor an id, or `revision` is malformed or given for a folder.
        CheckpointError: No such folder, a file, an unreadable folder, or a repository without a usable checkpoint.
        HubError: The hub refused, could not be reached, or the cache cannot hold or does not have all files.
    """
    found = _locate(path_or_id, revision, weights=weights, adapter=adapter)
    return found if isinstance(found, Path) else _download(found, show_progress=progress)


@dataclass(frozen=True)
class Listing:
    """The files of a checkpoint; those of one on the hub are in `folder` too, but for the weights.

    Attributes:
        folder: a local folder, or a snapshot in the hub's cache.
        size_bytes: of the files at the top level and of additional chat templates, by name; hidden ones left out.
        repo_id: the hub id; None for a local folder.
        commit: the full commit hash that a revision of the hub stands for; None for a local folder.
    """

    folder: Path
    size_bytes: Mapping[str, int]
    repo_id: str | None = None
    commit: str | None = None

    def fetch_header(self, name: str) -> dict[str, Any]:
        """Reads the table of contents of a safetensors file on the hub by a range request for its beginning.

        Returns:
            name -> {"dtype", "shape", "data_offsets"}, as the file has it.

        Raises:
            CheckpointError: the file is no safetensors file.
            HubError: as `resolve_folder`.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import SafetensorsParsingError

        assert self.repo_id is not None
        try:
            metadata = HfApi().parse_safetensors_file_metadata(self.repo_id, name, revision=self.commit)
        except SafetensorsParsingError as error:
            raise CheckpointError(
                f"{self.folder / name}: its header is damaged; expected a safetensors file; give another revision"
            ) from error
        except Exception as error:  # as in _ask
            raise explain(error, Wanted(self.repo_id, self.commit, weights=True)) from error
        return {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": info.data_offsets}
            for tensor, info in metadata.tensors.items()
        }


def list_files(path_or_id: str | os.PathLike[str], *, revision: str | None = None, progress: bool = True) -> Listing:
    """Finds a checkpoint and the sizes of its files, whatever state it is in; of one on the hub no weights are downloaded.

    Args, Raises: as `resolve_folder`. Without an answer of the hub, a cached copy must be whole, weights included.
    """
    found = _locate(path_or_id, revision, weights=False)
    if isinstance(found, Path):
        return Listing(found, _local_sizes(found))
    answer = _ask(replace(found, weights=True))
    if isinstance(answer, Path):
        return Listing(answer, _local_sizes(answer), found.repo_id, answer.name)
    folder = _fetch(found, answer, show_progress=progress)
    return Listing(
        folder, {name: answer[name] for name in sorted(answer) if _matters(name)}, found.repo_id, folder.name
    )


def _local_sizes(folder: Path) -> dict[str, int]:
    paths = [path for path in (*folder.iterdir(), *(folder / TEMPLATES).glob("*.jinja")) if path.is_file()]
    names = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    return {name: path.stat().st_size for name, path in names.items() if _matters(name)}


def _matters(name: str) -> bool:
    folder, _, base = name.rpartition("/")
    return not base.startswith(".") and (not folder or (folder == TEMPLATES and base.endswith(".jinja")))


def _locate(
    path_or_id: str | os.PathLike[str], revision: str | None, *, weights: bool, adapter: bool = False
) -> Path | Wanted:
    """An existing folder, or what to ask the hub for."""
    text = os.fspath(path_or_id)
    folder = _existing_folder(text) if text else None
    if folder is not None:
        if revision is not None:
            raise InputError(
                f"revision {revision!r} was given with the local folder {text!r}; expected a revision with a hub id"
                f" only; leave the revision out"
            )
        return folder
    if not isinstance(path_or_id, str) or _looks_like_path(text):
        raise CheckpointError(_no_folder_message(text))

    if not is_repo_id(text):
        raise InputError(
            f"{text!r} is neither an existing folder nor a hub id; expected a folder, or an id such as 'name' or"
            f" 'org/name'; check the spelling, and give a branch or commit as revision"
        )
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InputError(f"revision is {revision!r}; expected a branch, a tag or a full commit hash; correct it")
    return Wanted(text, revision, weights, adapter)


def _existing_folder(text: str) -> Path | None:
    """The readable folder that `text` names, or None where nothing of that name exists."""
    folder = Path(os.path.expanduser(text))
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            raise CheckpointError(
                f"{text!r} is a file; expected a folder; give the folder that holds it, {str(folder.parent)!r}"
            )
        # Reading the list and passing through are two permissions, and macOS keeps private folders from both.
        with os.scandir(folder) as entries:
            next(entries, None)
        os.stat(os.path.join(folder, os.curdir))
    except PermissionError as error:
        raise CheckpointError(
            f"{text!r} cannot be read ({error.strerror}); expected permission to list and enter the folder; run"
            f" `chmod u+rx` on it, or on macOS let this program see it under Privacy & Security, Files and Folders"
        ) from error
    except (OSError, ValueError):  # not there, too long, or with a null character: no folder
        return None
    return folder


def _looks_like_path(text: str) -> bool:
    starts = text.startswith(("/", "./", "../", "~"))
    return starts or text.endswith("/") or text.count("/") > 1 or text.lower().endswith(_FILE_SUFFIXES)


def _no_folder_message(text: str) -> str:
    if "://" in text:
        return f"no such folder {text!r}; expected a folder or a hub id; give the id alone, as 'org/name'"
    if text.lower().endswith(_FILE_SUFFIXES):
        return f"no such folder {text!r}; expected a folder, not a file's name; give the folder that holds the file"
    return (
        f"no such folder {text!r}; expected an existing folder, or a hub id such as 'name' or 'org/name'; check the"
        f" spelling"
    )


def _download(wanted: Wanted, *, show_progress: bool) -> Path:
    answer = _ask(wanted)
    if isinstance(answer, Path):
        return answer
    _check_listing(wanted, answer)
    folder = _fetch(wanted, answer, show_progress=show_progress)
    if missing := _missing_files(folder, wanted):
        raise CheckpointError(
            f"repository {wanted} does not give {_few(missing)}; expected every file that {INDEX} names, as"
            f" {wanted.tensors}; give another revision"
        )
    return folder


def _ask(wanted: Wanted) -> dict[str, int] | Path:
    """The repository's files and their sizes in bytes; without an answer of the hub, a whole cached copy."""
    from huggingface_hub import HfApi, constants, is_offline_mode

    if is_offline_mode():
        return _cached_folder(wanted, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE and run again to download it")
    try:
        # snapshot_download would ask this too, but without a time limit, and fall back to the cache without a word.
        info = HfApi().model_info(
            wanted.repo_id, revision=wanted.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:  # httpx, the hub, the system and a token each raise kinds of their own
        outage = find_outage(error)
        if outage is None:
            raise explain(error, wanted) from error
        folder = _cached_folder(wanted, *outage)
        _logger.warning("%s; using the cached copy of %s, which may be outdated", outage[0], wanted)
        return folder
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _fetch(wanted: Wanted, size_bytes: Mapping[str, int], *, show_progress: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                wanted.repo_id,
                revision=wanted.revision,
                allow_patterns=[*wanted.files, *DOCUMENTS],
                ignore_patterns=list(NEVER),
                tqdm_class=None if show_progress and stderr_is_terminal() else _silent_bar(),
            )
        )
    except Exception as error:  # as in _ask, and hf_xet besides
        raise explain(error, wanted, size_bytes) from error


def stderr_is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _silent_bar() -> type[Any]:
    """huggingface_hub's bar, never drawn: its own switch is global to the process."""
    from huggingface_hub.utils import tqdm as hub_tqdm

    class SilentBar(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return SilentBar


def _cached_folder(wanted: Wanted, why: str, remedy: str) -> Path:
    """The cached snapshot of the revision, if it is whole; `why` and `remedy` complete the error if not."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        # Documents are not asked for: a copy that another program cached without them is good enough to load.
        folder = Path(
            snapshot_download(
                wanted.repo_id,
                revision=wanted.revision,
                allow_patterns=wanted.files,
                ignore_patterns=list(NEVER),
                local_files_only=True,
            )
        )
    except IncompleteSnapshotError as error:
        folder = Path(error.snapshot_path)
        raise _incomplete(wanted, _missing_files(folder, wanted), why, remedy) from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{why}, and {wanted} is not in the cache {constants.HF_HUB_CACHE!r}; expected a cached copy; {remedy}, or"
            f" give a local folder"
        ) from error
    if missing := _missing_files(folder, wanted):
        raise _incomplete(wanted, missing, why, remedy)
    return folder


def _incomplete(wanted: Wanted, missing: list[str], why: str, remedy: str) -> HubError:
    return HubError(
        f"{why}, and the cached copy of {wanted} lacks {_few(missing)}; expected a complete copy; {remedy}: files that"
        f" are there are kept"
    )


def _missing_files(folder: Path, wanted: Wanted) -> list[str]:
    """What a snapshot lacks of the files that the hub's cached listing and the snapshot's own index name."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:  # a snapshot's folder is named by its commit
        listed = [file.path for file in get_cached_repo_tree(wanted.repo_id, revision=folder.name)]
    except CachedRepoTreeNotFoundError:  # cached by an older huggingface_hub, or file by file
        listed = []
    expected = {wanted.config, *wanted.choose(listed)}
    if wanted.weights:
        shards = set() if wanted.adapter else _shards_in_index(folder / INDEX)
        expected |= shards
        if not shards and not any(path.is_file() for path in folder.glob(wanted.tensors)):
            expected.add("adapter_model.safetensors" if wanted.adapter else "model.safetensors")
    # A name that leads elsewhere is never looked up: shards lie beside their index.
    outside = {name for name in expected - set(listed) if Path(name).name != name}
    return sorted(outside | {name for name in expected - outside if not (folder / name).is_file()})


def _shards_in_index(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a damaged index is the loader's to report
        return set()


def _check_listing(wanted: Wanted, names: Iterable[str]) -> None:
    """Refuse a repository without a usable checkpoint before anything of it is downloaded."""
    names = sorted(names)
    if wanted.weights and not any(name.endswith(".safetensors") for name in wanted.choose(names)):
        found = [name for name in names if name.lower().endswith(_WEIGHT_SUFFIXES)]
        if "adapter_config.json" in names and not wanted.adapter:
            remedy = "this is an adapter: load its base model, and give the adapter as adapter_path"
        elif any(name.endswith(".safetensors") for name in found):
            remedy = "save the model again with transformers' save_pretrained, which names the files so"
        else:
            remedy = "give a revision or repository that has safetensors, or convert it with transformers"
        raise CheckpointError(
            f"repository {wanted} has {_few(found) or 'no weights'}; expected {wanted.tensors} at its top level: only"
            f" safetensors are read; {remedy}"
        )
    if wanted.config not in names:
        kind = "an adapter as PEFT or mlx-lm saves it" if wanted.adapter else "a checkpoint as transformers saves it"
        raise CheckpointError(f"repository {wanted} has no {wanted.config}; expected {kind}; check the id")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
