"""What is asked of the hub, by which file names, and what it means when the hub refuses."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from ..errors import HubError

INDEX = "model.safetensors.index.json"
TEMPLATES = "additional_chat_templates"
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    f"{TEMPLATES}/*.jinja",
)
# `consolidated*.safetensors` and `original/` hold the same weights a second time.
WEIGHTS = "model*.safetensors"
DOCUMENTS = ("README.md", "LICENSE*", "NOTICE*")
# The hub's `*` crosses slashes: without these the patterns above would reach into folders, pickles and code.
NEVER = ("*/*.safetensors", "LICENSE*/*", "NOTICE*/*", "*.bin", "*.gguf", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.py")


@dataclass(frozen=True)
class Wanted:
    """What is asked of the hub."""

    repo_id: str
    revision: str | None
    weights: bool
    adapter: bool = False

    def __str__(self) -> str:
        return f"{self.repo_id!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    @property
    def config(self) -> str:
        """The file that says what the weights are."""
        return "adapter_config.json" if self.adapter else "config.json"

    @property
    def tensors(self) -> str:
        """The pattern of the weights' files."""
        return "adapter*.safetensors" if self.adapter else WEIGHTS

    @property
    def files(self) -> list[str]:
        """Patterns of the files a model or an adapter is loaded from."""
        return [*([self.config] if self.adapter else _MODEL_FILES), *([self.tensors] if self.weights else [])]

    def choose(self, names: Iterable[str]) -> list[str]:
        from huggingface_hub.utils import filter_repo_objects

        return list(filter_repo_objects(names, allow_patterns=self.files, ignore_patterns=list(NEVER)))


def is_repo_id(text: str) -> bool:
    """Whether a repository could have this name: `name` or `org/name` in the characters the hub allows."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.isascii()  # what older huggingface_hub lets pass


def find_outage(error: BaseException) -> tuple[str, str] | None:
    """Why the hub gave no answer, and what to do; None if it did answer, or something else went wrong."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 429:
            return f"{site()} takes no more requests for now (429)", "wait a while, or log in with `hf auth login`"
        if status >= 500:
            return f"{site()} is in trouble ({status})", "try again later"
        return None
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return (
            f"{site()} could not be reached ({type(error).__name__})",
            "check the network, the proxy and HF_ENDPOINT, and run again",
        )
    return None


def explain(error: Exception, wanted: Wanted, size_bytes: Mapping[str, int] | None = None) -> HubError:
    """What a failed request means and what to do. Holds none of the answer's own words: they may repeat secrets."""
    from huggingface_hub import constants, errors

    # What went wrong on the wire arrives wrapped as "not in the cache".
    cause: BaseException = error
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__
    if outage := find_outage(cause):
        return HubError(f"{wanted} could not be downloaded: {outage[0]}; expected an answer; {outage[1]}")
    if isinstance(cause, errors.GatedRepoError):
        return HubError(
            f"{wanted} is gated; expected an account that may read it; open {site()}/{wanted.repo_id}, accept the"
            f" terms, and log in as that account with `hf auth login`"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return HubError(
            f"{wanted.repo_id!r} has no revision {wanted.revision!r}; expected a branch, a tag or a full commit hash;"
            f" see {site()}/{wanted.repo_id}, or leave the revision out"
        )
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        if isinstance(cause, errors.RepositoryNotFoundError) or status == 401:
            return HubError(
                f"{wanted} is missing or private; expected a repository that this account may read; check the"
                f" spelling, and if it is private or the token has expired, log in with `hf auth login`"
            )
        if isinstance(cause, errors.DisabledRepoError):
            return HubError(f"{wanted} is disabled on {site()}; expected an open repository; choose another one")
        return HubError(
            f"{wanted} could not be downloaded: {site()} answered {status}; expected 200; if it is 403, give the token"
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
        f"{wanted} could not be downloaded ({type(cause).__name__}); expected the answers of a hub from {site()};"
        f" check that no proxy or login page stands between and that HF_ENDPOINT is right, and run again"
    )


def explain_upload(error: Exception, repo_id: str) -> str:
    """What a failed upload's request means and what to do, without the answer's own words as in `explain`."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # A file that failed over plain HTTP, and a README.md that the hub refuses, arrive wrapped in one of these.
    cause = (error.__cause__ if type(error) in (RuntimeError, ValueError) else None) or error
    login = "log in with `hf auth login`, or set HF_TOKEN, which goes before it"
    if isinstance(cause, LocalTokenNotFoundError):
        what, remedy = "there is no token", login
    elif type(cause) is ConnectionError:  # all that hf_xet ever says
        what = f"the storage of {site()} did not take the files"
        remedy = "check the network and the proxy, or set HF_HUB_DISABLE_XET=1 to upload over plain HTTP"
    elif outage := find_outage(cause):
        what, remedy = outage
    elif isinstance(cause, HfHubHTTPError):
        status = cause.response.status_code
        what, remedy = f"{site()} answered {status}", "check the repository's name and the metadata of README.md"
        if status == 401:
            what, remedy = f"{site()} does not know the token ({status})", login
        elif status == 403:
            what = f"{site()} does not allow it ({status})"
            remedy = f"see what the token may do and that the account has space left, and if need be {login}"
    else:
        what = os.strerror(cause.errno) if isinstance(cause, OSError) and cause.errno else type(cause).__name__
        remedy = "check that no proxy or login page stands between and that HF_ENDPOINT is right"
    return f"{what}; expected {site()} to take files for {repo_id!r} with your token; {remedy}"


def _space_needed(wanted: Wanted, size_bytes: Mapping[str, int] | None, cache: str) -> str:
    total_bytes = sum(size_bytes[name] for name in wanted.choose(size_bytes)) if size_bytes else 0
    if not total_bytes:
        return "room for the whole model"
    try:
        free = f", where {shutil.disk_usage(cache).free / 1e9:.2f} GB are free"
    except OSError:
        free = ""
    return f"room for {total_bytes / 1e9:.2f} GB in all{free}"


def site() -> str:
    """The hub's address, without the name and password that HF_ENDPOINT may hold."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
