"""A local folder becomes a repository on the Hugging Face Hub: in one commit, all of it or nothing.

huggingface_hub does the work: login, xet or LFS, retries, progress. This file adds the check before long work, and errors
that say what to do.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import HubError, InputError
from .hub_request import find_outage, site

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def check_upload(repo_id: str) -> None:
    """Checks that an upload can begin, before the work whose result is to be uploaded.

    Args:
        repo_id: "organisation-or-user/name".

    Raises:
        InputError: it is no such name.
        HubError: offline mode is on, nobody is logged in, or the hub cannot be reached or refuses the token.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not _REPO_ID.fullmatch(repo_id) or ".." in repo_id or "--" in repo_id:
        raise InputError(f"{repo_id!r} names no repository to upload to; expected 'user/name' or 'organisation/name'")
    if constants.is_offline_mode():
        raise HubError(f"{repo_id!r} cannot be uploaded to in offline mode; expected a network; unset HF_HUB_OFFLINE")
    if get_token() is None:
        raise HubError(
            f"{repo_id!r} cannot be uploaded to without an account; expected a token that may write; log in with "
            f"`hf auth login`"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # as in hub.py: huggingface_hub raises many kinds, `_explain` knows those that matter
        raise _explain(error, repo_id, advice="") from error


def upload_folder(folder: Path, repo_id: str, *, commit_message: str) -> str:
    """Uploads a folder's files, hidden ones left out, as one commit; makes the repository if there is none.

    Weights that an earlier upload left in the repository and the folder does not have are removed in the same commit.

    Args:
        folder: complete.
        repo_id: "organisation-or-user/name".
        commit_message: its first line.

    Returns:
        the repository's address.

    Raises:
        HubError: the hub refused, or could not be reached; the repository is as it was before.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }
    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        stale = [name for name in api.list_repo_files(repo_id) if name.endswith(".safetensors") and name not in files]
        api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()),
                *(CommitOperationDelete(path_in_repo=name) for name in stale),
            ],
            commit_message=commit_message,
        )
    except Exception as error:
        advice = f"; {folder} is complete: upload it again with `hf upload {repo_id} {folder}`"
        raise _explain(error, repo_id, advice=advice) from error
    return f"{site()}/{repo_id}"


def _explain(error: Exception, repo_id: str, *, advice: str) -> HubError:
    """What a failed request means. Holds none of the answer's own words: they may repeat secrets."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of one file among several
        error = error.__cause__
    what = f"{repo_id!r} could not be uploaded to"
    if outage := find_outage(error):
        return HubError(f"{what}: {outage[0]}; expected an answer; {outage[1]}{advice}")
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        reasons = {
            401: ("the token is not valid", "log in again with `hf auth login`"),
            403: ("this account or token may not write there", "check the name, or log in with a token that may write"),
            404: ("there is no such organisation, or the token may not see it", "check the name"),
        }
        reason, help_text = reasons.get(status, (f"{site()} answered {status}", "try again"))
        return HubError(f"{what}: {reason}; expected the right to write; {help_text}{advice}")
    return HubError(
        f"{what} ({type(error).__name__}); expected the answers of a hub from {site()}; check the network and run again"
        f"{advice}"
    )
