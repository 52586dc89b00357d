"""resolve_folder without the network, with one that fails, and in offline mode: only whole copies are passed on."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from arcee_mlx.checkpoint.hub import resolve_folder
from arcee_mlx.errors import HubError

from hub_data import MODEL, SHARDS, contents, go_offline
from loopback_hub import LoopbackHub


def snapshot(tmp_path: Path, repo: str = "models--org--model") -> Path:
    (folder,) = (tmp_path / "cache" / repo / "snapshots").iterdir()
    return folder


# No network


def test_no_network_and_no_copy_says_what_to_do(hub: LoopbackHub) -> None:
    hub.close()
    with pytest.raises(HubError, match="could not be reached.*'org/model' is not in the cache.*check the network"):
        resolve_folder("org/model")


@pytest.mark.parametrize("revision", [None, "v2", "a" * 40])
def test_no_network_uses_a_whole_copy_with_one_warning(
    hub: LoopbackHub, caplog: pytest.LogCaptureFixture, revision: str | None
) -> None:
    hub.add("org/model", MODEL, branch=revision or "main")
    folder = resolve_folder("org/model", revision=revision)
    hub.close()
    caplog.clear()
    assert resolve_folder("org/model", revision=revision) == folder
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert warning.name == "arcee_mlx"
    assert "could not be reached" in warning.getMessage()
    assert "cached copy of 'org/model'" in warning.getMessage()


def test_hub_in_trouble_is_no_network(hub: LoopbackHub, caplog: pytest.LogCaptureFixture) -> None:
    repo = hub.add("org/model", MODEL)
    folder = resolve_folder("org/model")
    repo.status = 503
    assert resolve_folder("org/model") == folder
    assert "in trouble (503)" in caplog.text


def test_no_network_uses_a_copy_of_the_asked_revision_only(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    resolve_folder("org/model")
    hub.close()
    with pytest.raises(HubError, match="'org/model' at revision 'v2' is not in the cache"):
        resolve_folder("org/model", revision="v2")


@pytest.mark.parametrize("has_listing", [True, False])
@pytest.mark.parametrize("lost", ["config.json", "model-00002-of-00002.safetensors", "model.safetensors"])
def test_incomplete_copy_is_never_passed_on(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lost: str, has_listing: bool
) -> None:
    hub.add("org/model", SHARDS if lost != "model.safetensors" else MODEL)
    folder = resolve_folder("org/model")
    os.remove(os.path.realpath(folder / lost))
    if not has_listing:
        forget_listing(monkeypatch, folder)
    hub.close()
    with pytest.raises(HubError, match=f"could not be reached.*cached copy of 'org/model' lacks {lost}; .*kept"):
        resolve_folder("org/model")


def test_small_file_that_only_the_listing_knows_is_missed(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    os.remove(os.path.realpath(resolve_folder("org/model") / "tokenizer_config.json"))
    hub.close()
    with pytest.raises(HubError, match="cached copy of 'org/model' lacks tokenizer_config.json; "):
        resolve_folder("org/model")


def forget_listing(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make the cache one that a huggingface_hub without listings wrote."""
    import huggingface_hub._tree_cache as tree_cache

    (folder.parents[1] / "trees" / f"{folder.name}.json").unlink()
    monkeypatch.setattr(tree_cache, "_IN_MEMORY_TREE_CACHE", {})


def test_copy_without_documents_is_whole(hub: LoopbackHub, caplog: pytest.LogCaptureFixture) -> None:
    """Other programs cache a model without its README."""
    hub.add("org/model", MODEL)
    huggingface_hub.snapshot_download("org/model", ignore_patterns=["README.md", "LICENSE"])
    hub.close()
    assert set(contents(resolve_folder("org/model"))) == set(MODEL) - {"README.md", "LICENSE"}


def test_copy_without_weights_is_whole_for_those_who_want_none(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", MODEL)
    folder = resolve_folder("org/model", weights=False)
    go_offline(monkeypatch)
    assert resolve_folder("org/model", weights=False) == folder
    with pytest.raises(HubError, match="lacks model.safetensors"):
        resolve_folder("org/model")


def test_network_lost_in_the_middle_is_told_and_the_next_call_goes_on(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import file_download
    from huggingface_hub.errors import HTTPError

    hub.add("org/model", MODEL)
    real = file_download.http_get

    def fail_on_weights(url: str, *args: Any, **kwargs: Any) -> None:
        if url.endswith("model.safetensors"):
            raise HTTPError("connection lost")
        real(url, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", fail_on_weights)
        with pytest.raises(HubError, match="could not be downloaded: .*could not be reached .*run again"):
            resolve_folder("org/model")
    arrived = set(contents(snapshot(tmp_path)))
    assert "model.safetensors" not in arrived
    hub.requests.clear()
    assert contents(resolve_folder("org/model")) == MODEL
    assert set(hub.downloads()) == set(MODEL) - arrived


# Offline mode


def test_offline_uses_the_cache_without_a_request_or_a_warning(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("org/model", MODEL)
    folder = resolve_folder("org/model")
    go_offline(monkeypatch)
    hub.requests.clear()
    caplog.clear()
    assert resolve_folder("org/model") == folder
    assert not hub.requests
    assert not caplog.records


def test_offline_without_a_copy_names_the_id_and_the_variable(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/model", MODEL)
    go_offline(monkeypatch)
    with pytest.raises(
        HubError, match="HF_HUB_OFFLINE is set, and 'org/model' is not in the cache.*unset HF_HUB_OFFLINE"
    ):
        resolve_folder("org/model")
    assert not hub.requests
