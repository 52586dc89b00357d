"""What check_upload and upload_folder do, held against huggingface_hub's real upload code and a hub on loopback."""

from __future__ import annotations

import io
import random
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils._runtime import is_xet_available
from huggingface_hub.utils._xet import abort_xet_session

from arcee_mlx.checkpoint.hub import resolve_folder
from arcee_mlx.checkpoint.hub_upload import check_upload, upload_folder
from arcee_mlx.errors import ArceeError, HubError, InputError

from hub_data import contents, go_offline
from loopback_hub import LoopbackHub
from loopback_upload import Account

# How huggingface_hub passes a file to its HTTP client is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

SECRET = "hf_" + "secret" * 5
CARD = b"---\nlicense: apache-2.0\nbase_model: org/source\npipeline_tag: text-generation\n---\n\n# How good\n\nGr\xc3\xbc\xc3\x9fe.\n"
WEIGHTS = random.Random(0).randbytes(400_000)
SHARDED = {
    "config.json": b'{"model_type": "arcee"}',
    "model-00001-of-00002.safetensors": WEIGHTS[:250_000],
    "model-00002-of-00002.safetensors": WEIGHTS[250_000:],
    "model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}',
    "tokenizer.json": b'{"version": "1.0"}',
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "README.md": CARD,
}
ONE_FILE = {"config.json": b'{"model_type": "arcee", "a": 1}', "model.safetensors": WEIGHTS[:1000], "README.md": CARD}
MALFORMED = [
    "",
    "model",
    "a/b/c",
    "org/",
    "/model",
    "org/a b",
    "org/a--b",
    "./model",
    "org/\xe9",
    "https://host/org/model",
]


@pytest.fixture
def account(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> Account:
    """Who is logged in: the owner of `org`, over plain HTTP."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    return log_in(hub, monkeypatch, Account("org"))


@pytest.fixture(params=["lfs", "xet"])
def transfer(request: pytest.FixtureRequest, account: Account, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways that weights can go; xet with folders and patience of its own."""
    if request.param == "xet":
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        if not is_xet_available():
            pytest.skip("hf_xet is not installed")
        monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
        monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "1ms")
        abort_xet_session()  # the next one reads the environment again
        request.addfinalizer(abort_xet_session)
    return request.param


def log_in(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, account: Account) -> Account:
    hub.uploads.accounts[SECRET] = account
    monkeypatch.setenv("HF_TOKEN", SECRET)
    return account


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def remote(hub: LoopbackHub, repo_id: str = "org/model") -> dict[str, bytes]:
    """A repository's files, but for the one that the hub puts into each."""
    return {name: data for name, data in hub.uploads.files(repo_id).items() if name != ".gitattributes"}


# Uploads


def test_uploaded_folder_is_downloaded_byte_for_byte(hub: LoopbackHub, transfer: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "made", SHARDED)
    check_upload("org/model")
    address = upload_folder(folder, "org/model")
    assert hub.uploads.store.transfers == [transfer, transfer]
    assert remote(hub) == SHARDED
    assert contents(resolve_folder("org/model")) == SHARDED
    assert address == f"{hub.url}/org/model/commit/{hub.repos['org/model'].branches['main']}"
    assert contents(folder) == SHARDED


def test_card_keeps_its_metadata_and_its_text(hub: LoopbackHub, account: Account, tmp_path: Path) -> None:
    upload_folder(write(tmp_path / "made", ONE_FILE), "org/model")
    card = ModelCard.load(resolve_folder("org/model") / "README.md")
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == (
        "apache-2.0",
        "org/source",
        "text-generation",
    )
    assert card.content.encode() == CARD


@pytest.mark.parametrize(("first", "second"), [(SHARDED, ONE_FILE), (ONE_FILE, SHARDED)], ids=["to one", "to shards"])
def test_second_upload_is_a_new_commit_without_the_weights_of_the_first(
    hub: LoopbackHub, transfer: str, tmp_path: Path, first: dict[str, bytes], second: dict[str, bytes]
) -> None:
    upload_folder(write(tmp_path / "first", {**first, "logo.png": b"PNG"}), "org/model")
    commit = hub.repos["org/model"].branches["main"]
    upload_folder(write(tmp_path / "second", second), "org/model")
    assert [made for made, _ in hub.uploads.commits] == [commit, hub.repos["org/model"].branches["main"]]
    kept = {name: data for name, data in first.items() if not name.startswith("model")}
    assert remote(hub) == {**kept, "logo.png": b"PNG", **second}
    assert contents(resolve_folder("org/model", revision=commit)) == first


def test_weights_elsewhere_in_the_repository_stay(hub: LoopbackHub, account: Account, tmp_path: Path) -> None:
    others = dict.fromkeys(("fp16/model.safetensors", "models/x.safetensors", "model-q4.gguf"), b"kept")
    hub.add("org/model", others)
    upload_folder(write(tmp_path / "made", SHARDED), "org/model")
    assert remote(hub) == others | SHARDED


def test_upload_of_what_is_there_makes_no_commit(hub: LoopbackHub, transfer: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "made", SHARDED)
    assert upload_folder(folder, "org/model") == upload_folder(folder, "org/model")
    assert len(hub.uploads.commits) == 1


def test_hidden_and_partial_files_stay_here(hub: LoopbackHub, account: Account, tmp_path: Path) -> None:
    left = [".env", ".cache/model.safetensors", "images/.DS_Store", ".git/config", "model.safetensors.incomplete"]
    left += ["x.safetensors.partial", "made.partial-ab12/model.safetensors", "config.json.tmp", "y.part"]
    upload_folder(write(tmp_path / "made", ONE_FILE | dict.fromkeys(left, b"private")), "org/model")
    assert remote(hub) == ONE_FILE


def test_token_may_write_to_an_organisation(
    hub: LoopbackHub, account: Account, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log_in(hub, monkeypatch, Account("me", organisations=("org",)))
    check_upload("org/model")
    upload_folder(write(tmp_path / "made", ONE_FILE), "org/model")
    check_upload("org/model")
    assert remote(hub) == ONE_FILE


def test_login_that_is_stored_is_used(
    hub: LoopbackHub, account: Account, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(SECRET)
    check_upload("org/model")
    upload_folder(write(tmp_path / "made", ONE_FILE), "org/model")
    assert remote(hub) == ONE_FILE


# Before anything is made


def test_check_changes_nothing(hub: LoopbackHub, account: Account) -> None:
    check_upload("org/model")
    assert {request.method for request in hub.requests} == {"GET"}
    assert not hub.repos


@pytest.mark.parametrize("repo_id", MALFORMED)
def test_malformed_id_is_refused_before_anything_is_asked(
    hub: LoopbackHub, account: Account, tmp_path: Path, repo_id: str
) -> None:
    with pytest.raises(InputError, match="no repository can be named.*expected 'org/name'"):
        check_upload(repo_id)
    with pytest.raises(InputError, match="no repository can be named.*expected 'org/name'"):
        upload_folder(tmp_path, repo_id)
    assert not hub.requests


def test_missing_folder_makes_no_repository(hub: LoopbackHub, account: Account, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        upload_folder(tmp_path / "none", "org/model")
    assert not hub.requests


def test_offline_mode_is_told_before_anything_is_asked(
    hub: LoopbackHub, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_offline(monkeypatch)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set.*unset it"):
        check_upload("org/model")
    assert not hub.requests


def test_no_token_asks_for_a_login(
    hub: LoopbackHub, account: Account, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="'org/model' cannot be uploaded to: there is no token.*hf auth login"):
        check_upload("org/model")
    with pytest.raises(HubError, match="there is no token.*hf auth login"):
        upload_folder(write(tmp_path / "made", ONE_FILE), "org/model")
    assert not [request for request in hub.requests if "org" in request.path or "whoami" in request.path]


def test_token_that_the_hub_does_not_know_asks_for_a_login(hub: LoopbackHub, account: Account) -> None:
    hub.uploads.accounts.clear()
    with pytest.raises(HubError, match="does not know the token .401..*hf auth login.*HF_TOKEN") as error:
        check_upload("org/model")
    assert SECRET not in str(error.value)


def test_token_that_may_only_read_is_refused(
    hub: LoopbackHub, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_in(hub, monkeypatch, Account("org", role="read"))
    with pytest.raises(HubError, match="may only read; expected one that may write.*hf auth login"):
        check_upload("org/model")


def test_repository_of_others_is_refused(hub: LoopbackHub, account: Account) -> None:
    hub.add("others/model", ONE_FILE)
    with pytest.raises(HubError, match="does not allow it .403..*what the token may do.*hf auth login"):
        check_upload("others/model")


@pytest.mark.parametrize("part", ["whoami", "auth-check"])
@pytest.mark.parametrize(
    ("status", "message"),
    [
        (500, "in trouble .500.*try again later"),
        (429, "no more requests.*wait"),
        (None, "could not be reached.*network"),
    ],
)
def test_hub_without_an_answer_is_told(
    hub: LoopbackHub, account: Account, part: str, status: int | None, message: str
) -> None:
    hub.uploads.faults[part] = status
    with pytest.raises(HubError, match=f"'org/model' cannot be uploaded to: .*{message}"):
        check_upload("org/model")


def test_no_network_is_told(hub: LoopbackHub, account: Account) -> None:
    hub.close()
    with pytest.raises(HubError, match="could not be reached.*check the network"):
        check_upload("org/model")


def test_login_page_between_is_told(hub: LoopbackHub, account: Account) -> None:
    hub.is_login_page = True
    with pytest.raises(HubError, match="no proxy or login page"):
        check_upload("org/model")


# Uploads that fail


def fail(hub: LoopbackHub, folder: Path, message: str, *, repo_id: str = "org/model") -> None:
    """Fails to upload; holds what is true of every failure."""
    before = contents(folder)
    with pytest.raises(HubError, match=f"upload to '{repo_id}' failed: .*{message}") as error:
        upload_folder(folder, repo_id)
    assert str(error.value).endswith(f"is complete: `hf upload {repo_id} '{folder}'` uploads it again")
    assert SECRET not in str(error.value)
    assert contents(folder) == before
    assert not hub.uploads.commits


@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("repos/create", 500, "in trouble .500."),
        ("repos/create", None, "could not be reached"),
        ("preupload", 403, "does not allow it .403.*token.*space left"),
        ("preupload", 401, "does not know the token .401."),
        ("objects/batch", 503, "in trouble .503."),
        ("lfs/", 403, "does not allow it .403."),
        ("lfs/", 500, "in trouble .500."),
        ("lfs/", None, "could not be reached"),
        ("lfs-verify", 404, "answered 404"),
        ("commit", 500, "in trouble .500."),
        ("commit", 413, "answered 413"),
        ("commit", None, "could not be reached"),
    ],
)
def test_upload_that_fails_keeps_the_folder_and_can_be_done_again(
    hub: LoopbackHub, account: Account, tmp_path: Path, part: str, status: int | None, message: str
) -> None:
    folder = write(tmp_path / "made here", SHARDED)
    hub.uploads.faults[part] = status
    fail(hub, folder, message)
    hub.uploads.faults.clear()
    upload_folder(folder, "org/model")
    assert remote(hub) == SHARDED


@pytest.mark.parametrize("transfer", ["xet"], indirect=True)
@pytest.mark.parametrize(
    ("part", "status", "message"),
    [
        ("xet-write-token", 403, "the storage .* did not take the files.*HF_HUB_DISABLE_XET=1"),
        ("xorbs", 500, "the storage .* did not take the files"),
        ("xorbs", None, "the storage .* did not take the files"),
        ("shards", 400, "the storage .* did not take the files"),
        ("commit", 500, "in trouble .500."),
    ],
)
def test_upload_over_xet_that_fails_can_be_done_again(
    hub: LoopbackHub, transfer: str, tmp_path: Path, part: str, status: int | None, message: str
) -> None:
    folder = write(tmp_path / "made here", SHARDED)
    hub.uploads.faults[part] = status
    fail(hub, folder, message)
    hub.uploads.faults.clear()
    upload_folder(folder, "org/model")
    assert remote(hub) == SHARDED


def test_repository_that_may_not_be_made_is_told(hub: LoopbackHub, account: Account, tmp_path: Path) -> None:
    fail(hub, write(tmp_path / "made here", ONE_FILE), "does not allow it .403.", repo_id="others/model")
    assert not hub.repos


def test_card_that_the_hub_refuses_is_told(hub: LoopbackHub, account: Account, tmp_path: Path) -> None:
    folder = write(tmp_path / "made here", ONE_FILE | {"README.md": b"---\nlicense: mit\n"})
    fail(hub, folder, "answered 400.*metadata of README.md")


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "drawn"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_is_drawn_on_a_terminal_if_wanted(
    hub: LoopbackHub,
    transfer: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    stream: type[io.StringIO],
    progress: bool,
    drawn: bool,
) -> None:
    error_stream = stream()
    monkeypatch.setattr(sys, "stderr", error_stream)
    upload_folder(write(tmp_path / "made", SHARDED), "org/model", progress=progress)
    assert bool(error_stream.getvalue()) == drawn


@pytest.mark.parametrize("status", [None, 500])
def test_declining_progress_changes_nothing_for_other_users_of_the_hub(
    hub: LoopbackHub, account: Account, tmp_path: Path, status: int | None
) -> None:
    disable_progress_bars("a.group")
    try:
        if status is not None:
            hub.uploads.faults["commit"] = status
        try:
            upload_folder(write(tmp_path / "made", ONE_FILE), "org/model")
        except ArceeError:
            assert status is not None
        assert not are_progress_bars_disabled()
        assert are_progress_bars_disabled("a.group")
    finally:
        enable_progress_bars()
