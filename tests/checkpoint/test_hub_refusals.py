"""What resolve_folder says where the hub, the repository or the disk refuses."""

from __future__ import annotations

import errno
import json
import logging
import os
import traceback
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from arcee_mlx.checkpoint.hub import resolve_folder
from arcee_mlx.errors import CheckpointError, HubError

from hub_data import MODEL, SHARDS, contents
from loopback_hub import LoopbackHub

SECRET = "hf_" + "secret" * 5


# What the hub refuses


def test_missing_repository_asks_for_the_spelling_and_a_login(hub: LoopbackHub) -> None:
    with pytest.raises(HubError, match="'org/none' is missing or private.*check the spelling.*hf auth login") as error:
        resolve_folder("org/none")
    assert isinstance(error.value.__cause__, huggingface_hub.errors.RepositoryNotFoundError)


def test_private_repository_asks_for_a_login(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL).token = SECRET
    with pytest.raises(HubError, match="missing or private.*hf auth login"):
        resolve_folder("org/model")


def test_gated_repository_asks_to_accept_the_terms(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL).gated = True
    with pytest.raises(HubError, match="is gated.*accept the terms.*hf auth login") as error:
        resolve_folder("org/model")
    assert f"open {hub.url}/org/model," in str(error.value)
    assert isinstance(error.value.__cause__, huggingface_hub.errors.GatedRepoError)


def test_unknown_revision_is_named(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    with pytest.raises(HubError, match="'org/model' has no revision 'v9'.*leave the revision out") as error:
        resolve_folder("org/model", revision="v9")
    assert isinstance(error.value.__cause__, huggingface_hub.errors.RevisionNotFoundError)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (429, "no more requests for now .429.*wait"),
        (500, "in trouble .500.*try again later"),
        (503, "in trouble .503.*try again later"),
        (403, "answered 403.*permission"),
        (418, "answered 418"),
    ],
)
def test_status_of_the_hub_is_told_with_what_to_do(hub: LoopbackHub, status: int, message: str) -> None:
    hub.add("org/model", MODEL).status = status
    with pytest.raises(HubError, match=message) as error:
        resolve_folder("org/model")
    assert "'org/model'" in str(error.value)
    assert error.value.__cause__ is not None


def test_hub_that_fails_after_the_listing_is_told(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    hub.add("org/model", MODEL).file_status = 503
    with pytest.raises(HubError, match="could not be downloaded: .*in trouble .503.*try again later"):
        resolve_folder("org/model")


def test_login_page_between_is_told(hub: LoopbackHub) -> None:
    hub.is_login_page = True
    with pytest.raises(HubError, match="expected the answers of a hub.*login page.*HF_ENDPOINT"):
        resolve_folder("org/model")


def test_token_is_sent_and_never_shown(
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    repo = hub.add("org/model", MODEL)
    shown = []
    for spoil in ("missing", "gated", "status", "closed"):
        repo.gated, repo.status = spoil == "gated", 503 if spoil == "status" else None
        if spoil == "closed":
            hub.close()
        with pytest.raises(HubError) as error:
            resolve_folder("org/none" if spoil == "missing" else "org/model")
        shown += traceback.format_exception(error.value)
    assert f"Bearer {SECRET}" in {request.authorization for request in hub.requests}
    assert SECRET not in "".join(shown) + caplog.text + "".join(capfd.readouterr())


def test_password_in_the_endpoint_is_not_shown(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.close()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url.replace("//", "//user:s3cret@"))
    with pytest.raises(HubError, match="could not be reached") as error:
        resolve_folder("org/model")
    assert hub.url in str(error.value)
    assert "s3cret" not in str(error.value)


# Repositories that hold no checkpoint


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"pytorch_model.bin": b"", "config.json": b"{}"},
            "has pytorch_model.bin; .*only safetensors are read.*convert",
        ),
        (
            {"a.gguf": b"", "b.gguf": b"", "c.gguf": b"", "d.gguf": b""},
            "has a.gguf, b.gguf, c.gguf and 1 more; .*only saf",
        ),
        ({"consolidated.safetensors": b"", "config.json": b"{}"}, "has consolidated.safetensors; .*save_pretrained"),
        ({"original/model.safetensors": b"", "config.json": b"{}"}, "has original/model.safetensors; "),
        ({"adapter_model.safetensors": b"", "adapter_config.json": b"{}"}, "this is an adapter: load its base model"),
        ({"config.json": b"{}"}, "has no weights; expected model.*safetensors"),
        ({"model.safetensors": b""}, "has no config.json"),
        ({}, "has no weights"),
    ],
)
def test_repository_without_a_checkpoint_is_refused_before_any_download(
    hub: LoopbackHub, files: dict[str, bytes], message: str
) -> None:
    hub.add("org/model", files)
    with pytest.raises(CheckpointError, match=message):
        resolve_folder("org/model")
    assert not hub.downloads()


def test_repository_without_safetensors_still_gives_its_small_files(hub: LoopbackHub) -> None:
    hub.add("org/model", {"pytorch_model.bin": b"pickle", "config.json": b"{}"})
    assert contents(resolve_folder("org/model", weights=False)) == {"config.json": b"{}"}


@pytest.mark.parametrize("name", ["model-00002-of-00002.safetensors", "../../../../config.json", "/etc/hostname"])
def test_shard_that_the_repository_does_not_give_is_named(hub: LoopbackHub, tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    index = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": name}}).encode()
    hub.add(
        "org/model", {k: v for k, v in SHARDS.items() if "00002-of" not in k} | {"model.safetensors.index.json": index}
    )
    with pytest.raises(CheckpointError, match="does not give") as error:
        resolve_folder("org/model")
    assert name in str(error.value)


# The disk


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, r"no space left.*room for 0.00 GB in all, where \d+.\d\d GB are free; .*HF_HOME"),
        (errno.EACCES, "could not be kept in the cache.*Permission denied.*HF_HOME"),
    ],
)
def test_disk_that_refuses_says_what_is_needed(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    from huggingface_hub import file_download

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    hub.add("org/model", MODEL)
    monkeypatch.setattr(file_download, "http_get", refuse)
    with pytest.raises(HubError, match=message) as error:
        resolve_folder("org/model")
    assert isinstance(error.value.__cause__, OSError)
