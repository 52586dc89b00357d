"""A finished local folder becomes one commit on the Hugging Face Hub; whether it may can be asked before it is made.

huggingface_hub does the work: login, repository, transfer (over xet where hf_xet is installed, else over plain HTTP),
commit. This file adds which files go and which must go away, and errors that say what to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from ..errors import HubError, InputError
from .hub import stderr_is_terminal
from .hub_request import INDEX, explain_upload, is_repo_id

# What is hidden, or in something hidden, and what is not finished; the hub's `*` crosses slashes.
_NOT_UPLOADED = (".*", "*/.*", "*.partial*", "*.incomplete", "*.part", "*.tmp")
# An earlier upload's weights under other names: beside the new ones, a loader would find two models.
_REPLACED = ("model.safetensors", "model-?????-of-?????.safetensors", INDEX)


def check_upload(repo_id: str) -> None:
    """Checks, before work that takes long, that its result can be uploaded; changes nothing on the hub.

    That a new repository may not be made, or that there is no space left, shows only when it is uploaded to.

    Raises:
        InputError: `repo_id` is not `org/name`.
        HubError: Offline mode, no answer of the hub, no token, or one that is refused or may not write.
    """
    from huggingface_hub import HfApi, is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    _check_id(repo_id)
    if is_offline_mode():
        raise HubError(f"HF_HUB_OFFLINE is set; expected a way to the hub, to upload to {repo_id!r}; unset it")
    api = HfApi(token=True)
    try:
        account = api.whoami()
        try:
            api.auth_check(repo_id, write=True)
        except HfHubHTTPError as error:
            if error.response.status_code not in (401, 404):  # those say: not there yet, or not for all to know
                raise
        role = (account.get("auth", {}).get("accessToken") or {}).get("role")
    except Exception as error:  # as in hub.py
        raise HubError(f"{repo_id!r} cannot be uploaded to: {explain_upload(error, repo_id)}") from error
    if role == "read":
        raise HubError(
            f"{repo_id!r} cannot be uploaded to: the token may only read; expected one that may write; log in with such"
            f" a one with `hf auth login`, or set HF_TOKEN to it"
        )


def upload_folder(folder: Path, repo_id: str, *, progress: bool = False) -> str:
    """Uploads a folder as it stands as one commit, to a repository that is made if there is none.

    Hidden and partial files are left out. In the repository, files of the same names are replaced and other weights
    of a checkpoint removed; the rest stays.

    Args:
        folder: A finished checkpoint.
        repo_id: `org/name`. A new one is public or private as the account's settings have it.
        progress: Show huggingface_hub's progress bars, if standard error is a terminal.

    Returns:
        The commit's address; the latest one's if the repository had all of it already.

    Raises:
        InputError: `repo_id` is not `org/name`, or there is no such folder.
        HubError: The hub confirmed no commit; the folder is as it was.
    """
    from huggingface_hub import HfApi

    _check_id(repo_id)
    if not folder.is_dir():
        raise InputError(f"no such folder {str(folder)!r}; expected one to upload; check the spelling")
    api = HfApi(token=True)
    try:
        with _progress_bars(shown=progress and stderr_is_terminal()):
            api.create_repo(repo_id, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Upload a checkpoint made with arcee-mlx",
                ignore_patterns=list(_NOT_UPLOADED),
                delete_patterns=list(_REPLACED),
            ).commit_url
    except Exception as error:  # as in hub.py, and hf_xet besides
        raise HubError(
            f"the upload to {repo_id!r} failed: {explain_upload(error, repo_id)}; the folder {str(folder)!r} is complete:"
            f" `hf upload {repo_id} {quote(str(folder))}` uploads it again"
        ) from error


def _check_id(repo_id: str) -> None:
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise InputError(
            f"no repository can be named {repo_id!r}; expected 'org/name', your account or organisation first; correct it"
        )


@contextmanager
def _progress_bars(*, shown: bool) -> Iterator[None]:
    """Keeps the bars of huggingface_hub off if wanted: an upload takes none of ours. Its switches are put back after."""
    from huggingface_hub.utils.tqdm import progress_bar_states

    before = dict(progress_bar_states)
    if not shown:
        progress_bar_states["_global"] = False  # disable_progress_bars() would forget the switches of groups
    try:
        yield
    finally:
        progress_bar_states.clear()
        progress_bar_states.update(before)
