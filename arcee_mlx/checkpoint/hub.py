"""A path or a Hugging Face Hub id becomes a local folder; only safetensors and small text files are ever fetched.

huggingface_hub does the work: cache, resume, login, offline mode, progress. It is imported for an id and never for a
folder. This file adds which files are wanted, whether a cached copy is whole, and errors that say what to do.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import CheckpointError, HubError, InputError

_INDEX = "model.safetensors.index.json"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    _INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
# `consolidated*.safetensors` and `original/` hold the same weights a second time.
_WEIGHTS = "model*.safetensors"
_DOCUMENTS = ("README.md", "LICENSE*", "NOTICE*")
# The hub's `*` crosses slashes: without these the patterns above would reach into folders, pickles and code.
_NEVER = ("*/*.safetensors", "LICENSE*/*", "NOTICE*/*", "*.bin", "*.gguf", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.py")

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

    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError as error:
        raise InputError(
            f"{text!r} is neither an existing folder nor a hub id; expected a folder, or an id such as 'name' or"
            f" 'org/name'; check the spelling, and give a branch or commit as revision"
        ) from error
    if revision is not None and not _REVISION.fullmatch(revision):
        raise InputError(f"revision is {revision!r}; expected a branch, a tag or a full commit hash; correct it")
    return _download(_Wanted(text, revision, weights, adapter), show_progress=progress)


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
    return f"no such folder {text!r}; expected a folder or a hub id such as 'name' or 'org/name'; check the spelling"


@dataclass(frozen=True)
class _Wanted:
    """What is asked of the hub."""

    repo_id: str
    revision: str | None
    weights: bool
    adapter: bool

    def __str__(self) -> str:
        return f"{self.repo_id!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    @property
    def config(self) -> str:
        return "adapter_config.json" if self.adapter else "config.json"

    @property
    def tensors(self) -> str:
        return "adapter*.safetensors" if self.adapter else _WEIGHTS

    @property
    def files(self) -> list[str]:
        """Patterns of the files a model or an adapter is loaded from."""
        return [*([self.config] if self.adapter else _MODEL_FILES), *([self.tensors] if self.weights else [])]

    def choose(self, names: Iterable[str]) -> list[str]:
        from huggingface_hub.utils import filter_repo_objects

        return list(filter_repo_objects(names, allow_patterns=self.files, ignore_patterns=list(_NEVER)))


def _download(wanted: _Wanted, *, show_progress: bool) -> Path:
    from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download

    if is_offline_mode():
        return _cached_folder(wanted, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE and run again to download it")
    try:
        # snapshot_download would ask this too, but without a time limit, and fall back to the cache without a word.
        info = HfApi().model_info(
            wanted.repo_id, revision=wanted.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception as error:  # httpx, the hub, the system and a token each raise kinds of their own
        outage = _outage(error)
        if outage is None:
            raise _explained(error, wanted) from error
        folder = _cached_folder(wanted, *outage)
        _logger.warning("%s; using the cached copy of %s, which may be outdated", outage[0], wanted)
        return folder

    size_bytes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    _check_listing(wanted, size_bytes)
    try:
        folder = Path(
            snapshot_download(
                wanted.repo_id,
                revision=wanted.revision,
                allow_patterns=[*wanted.files, *_DOCUMENTS],
                ignore_patterns=list(_NEVER),
                tqdm_class=None if show_progress and _stderr_is_terminal() else _silent_bar(),
            )
        )
    except Exception as error:  # as above, and hf_xet besides
        raise _explained(error, wanted, size_bytes) from error
    if missing := _missing_files(folder, wanted):
        raise CheckpointError(
            f"repository {wanted} does not give {_few(missing)}; expected every file that {_INDEX} names, as"
            f" {wanted.tensors}; give another revision"
        )
    return folder


def _stderr_is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _silent_bar() -> type[Any]:
    """huggingface_hub's bar, never drawn: its own switch is global to the process."""
    from huggingface_hub.utils import tqdm as hub_tqdm

    class SilentBar(hub_tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))

    return SilentBar


def _cached_folder(wanted: _Wanted, why: str, remedy: str) -> Path:
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
                ignore_patterns=list(_NEVER),
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


def _incomplete(wanted: _Wanted, missing: list[str], why: str, remedy: str) -> HubError:
    return HubError(
        f"{why}, and the cached copy of {wanted} lacks {_few(missing)}; expected a complete copy; {remedy}: files that"
        f" are there are kept"
    )


def _missing_files(folder: Path, wanted: _Wanted) -> list[str]:
    """What a snapshot lacks of the files that the hub's cached listing and the snapshot's own index name."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:  # a snapshot's folder is named by its commit
        listed = [file.path for file in get_cached_repo_tree(wanted.repo_id, revision=folder.name)]
    except CachedRepoTreeNotFoundError:  # cached by an older huggingface_hub, or file by file
        listed = []
    expected = {wanted.config, *wanted.choose(listed)}
    if wanted.weights:
        shards = set() if wanted.adapter else _shards_in_index(folder / _INDEX)
        if not shards and not any(path.is_file() for path in folder.glob(wanted.tensors)):
            shards = {"adapter_model.safetensors" if wanted.adapter else "model.safetensors"}
        expected |= shards
    # A name that leads elsewhere is never looked up: shards lie beside their index.
    outside = {name for name in expected - set(listed) if Path(name).name != name}
    return sorted(outside | {name for name in expected - outside if not (folder / name).is_file()})


def _shards_in_index(index: Path) -> set[str]:
    try:
        return {str(name) for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # a damaged index is the loader's to report
        return set()


def _check_listing(wanted: _Wanted, names: Iterable[str]) -> None:
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
        raise CheckpointError(f"repository {wanted} has no {wanted.config}; expected it; check the id")


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _outage(error: BaseException) -> tuple[str, str] | None:
    """Why the hub gave no answer, and what to do; None if it did answer, or something else went wrong."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 429:
            return f"{_site()} takes no more requests for now (429)", "wait a while, or log in with `hf auth login`"
        if status >= 500:
            return f"{_site()} is in trouble ({status})", "try again later"
        return None
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return (
            f"{_site()} could not be reached ({type(error).__name__})",
            "check the network, the proxy and HF_ENDPOINT, and run again",
        )
    return None


def _explained(error: Exception, wanted: _Wanted, size_bytes: Mapping[str, int] | None = None) -> HubError:
    """What a failed request means and what to do. Holds none of the answer's own words: they may repeat secrets."""
    from huggingface_hub import constants, errors

    # What went wrong on the wire arrives wrapped as "not in the cache".
    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__
    if outage := _outage(cause):
        return HubError(f"{wanted} could not be downloaded: {outage[0]}; expected an answer; {outage[1]}")
    if isinstance(cause, errors.GatedRepoError):
        return HubError(
            f"{wanted} is gated; expected an account that may read it; open {_site()}/{wanted.repo_id}, accept the"
            f" terms, and log in as that account with `hf auth login`"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubError(
            f"{wanted.repo_id!r} has no revision {wanted.revision!r}; expected a branch, a tag or a full commit hash;"
            f" see {_site()}/{wanted.repo_id}, or leave the revision out"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
            return HubError(
                f"{wanted} is missing or private; expected a repository that this account may read; check the"
                f" spelling, and if it is private or the token has expired, log in with `hf auth login`"
            )
        if isinstance(cause, errors.DisabledRepoError):
            return HubError(f"{wanted} is disabled on {_site()}; expected an open repository; choose another one")
        return HubError(
            f"{wanted} could not be downloaded: {_site()} answered {status}; expected 200; if it is 403, give the token"
            f" permission to read and log in again with `hf auth login`, else run again"
        )
    if isinstance(cause, OSError) and cause.errno is not None:
        cache = constants.HF_HUB_CACHE
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            needed = _space_needed(wanted, size_bytes, cache)
            return HubError(
                f"no space left for {wanted} in the cache {cache!r}; expected {needed}; free some, or set HF_HOME to a"
                f" folder on a larger disk"
            )
        return HubError(
            f"{wanted} could not be kept in the cache {cache!r} ({os.strerror(cause.errno)}); expected a folder that"
            f" can be written; mend its permissions, or set HF_HOME to another one"
        )
    return HubError(
        f"{wanted} could not be downloaded ({type(cause).__name__}); expected the answers of a hub from {_site()};"
        f" check that no proxy or login page stands between and that HF_ENDPOINT is right, and run again"
    )


def _space_needed(wanted: _Wanted, size_bytes: Mapping[str, int] | None, cache: str) -> str:
    total_bytes = sum(size_bytes[name] for name in wanted.choose(size_bytes)) if size_bytes else 0
    if not total_bytes:
        return "room for the whole model"
    try:
        free = f", where {shutil.disk_usage(cache).free / 1e9:.2f} GB are free"
    except OSError:
        free = ""
    return f"room for {total_bytes / 1e9:.2f} GB in all{free}"


def _site() -> str:
    """The hub's address, without the name and password that HF_ENDPOINT may hold."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
