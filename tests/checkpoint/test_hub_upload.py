"""Uploading a folder: one commit with all of it, and for each way it can fail an error that says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from arcee_mlx.checkpoint.hub import resolve_folder
from arcee_mlx.checkpoint.hub_upload import check_upload, upload_folder
from arcee_mlx.errors import HubError, InputError

from loopback_hub import LoopbackHub
from loopback_upload import TOKEN

# huggingface_hub's own way to send an LFS object, which its HTTP library finds old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CARD = "---\nlicense: apache-2.0\nlibrary_name: mlx\n---\n\n# Model\n"


@pytest.fixture
def account(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """A hub that knows us; weights go by LFS, since a loopback hub has no xet storage."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "arcee"}')
    (folder / "README.md").write_text(CARD)
    (folder / "additional_chat_templates/tools.jinja").write_text("{{ x }}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 500)
    (folder / ".journal").write_text("private")
    return folder


def uploaded(hub: LoopbackHub, repo_id: str) -> dict[str, bytes]:
    repo = hub.repos[repo_id]
    return repo.revisions[repo.branches["main"]]


def test_what_was_uploaded_is_what_lies_in_the_folder_and_can_be_downloaded(account: LoopbackHub, folder: Path) -> None:
    check_upload("me/model")
    assert upload_folder(folder, "me/model", commit_message="Add") == f"{account.url}/me/model"
    expected = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".journal"
    }
    assert uploaded(account, "me/model") == expected and account.uploads.commits == ["Add"]
    copy = resolve_folder("me/model", progress=False)
    assert (copy / "model.safetensors").read_bytes() == expected["model.safetensors"]
    assert (copy / "README.md").read_text() == CARD


def test_a_second_upload_is_a_second_commit_and_takes_stale_weights_away(account: LoopbackHub, folder: Path) -> None:
    account.add("me/model", {"model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept"})
    upload_folder(folder, "me/model", commit_message="One")
    (folder / "config.json").write_text("{}")
    upload_folder(folder, "me/model", commit_message="Two")
    files = uploaded(account, "me/model")
    assert files["config.json"] == b"{}" and files["notes.txt"] == b"kept"
    assert "model-00001-of-00002.safetensors" not in files and account.uploads.commits == ["One", "Two"]


@pytest.mark.parametrize(
    "repo_id", ["model", "me/", "/model", "me/a/b", "me/../x", "me/mod el", "https://hub/me/model", ""]
)
def test_a_name_that_is_no_repository_is_refused_before_anything_is_asked(account: LoopbackHub, repo_id: str) -> None:
    with pytest.raises(InputError, match="names no repository"):
        check_upload(repo_id)
    assert not account.requests


def test_nobody_logged_in_a_bad_token_and_offline_mode_are_said_before_the_work(
    account: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HubError, match="token is not valid.*hf auth login"):
        check_upload("me/model")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="without an account.*hf auth login"):
        check_upload("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode"):
        check_upload("me/model")


@pytest.mark.parametrize("step", ["create", "preupload", "batch", "object", "commit"])
def test_a_failure_at_any_step_leaves_the_repository_as_it_was(account: LoopbackHub, folder: Path, step: str) -> None:
    if step != "create":
        account.add("me/model", {"config.json": b"old"})
    account.uploads.break_at = step
    with pytest.raises(
        HubError, match=r"could not be uploaded.*is complete: upload it again with `hf upload me/model"
    ) as told:
        upload_folder(folder, "me/model", commit_message="Add")
    assert TOKEN not in str(told.value)
    if step == "create":
        assert "me/model" not in account.repos
    else:
        assert uploaded(account, "me/model") == {"config.json": b"old"}


def test_an_account_that_may_not_write_is_told_so(account: LoopbackHub, folder: Path) -> None:
    account.uploads.can_write = False
    with pytest.raises(HubError, match="may not write there"):
        upload_folder(folder, "them/model", commit_message="Add")


def test_a_hub_that_is_gone_is_an_outage(account: LoopbackHub, folder: Path) -> None:
    account.close()
    with pytest.raises(HubError, match="could not be reached"):
        check_upload("me/model")
