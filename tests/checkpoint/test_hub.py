"""Properties of resolve_folder, held against the real download code of huggingface_hub and a hub on loopback."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

import arcee_mlx.checkpoint.hub
from arcee_mlx.checkpoint.hub import resolve_folder
from arcee_mlx.errors import CheckpointError, HubError, InputError

from loopback_hub import LoopbackHub

PACKAGE_PARENT = Path(arcee_mlx.checkpoint.hub.__file__).parents[2]
SECRET = "hf_" + "secret" * 5
MODEL = {
    "config.json": b'{"model_type": "arcee"}',
    "generation_config.json": b'{"temperature": 0.5}',
    "model.safetensors": bytes(range(256)) * 300,
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "e"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "README.md": b"# model",
    "LICENSE": b"Apache-2.0",
}
UNWANTED = {
    "modeling_arcee.py": b"raise SystemExit('remote code ran')",
    "LICENSE.py": b"raise SystemExit('remote code ran')",
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "model-q4.gguf": b"GGUF",
    "consolidated.safetensors": b"the weights again",
    "consolidated.safetensors.index.json": b"{}",
    "original/model.safetensors": b"the weights again",
    "model_parts/model.safetensors": b"the weights again",
    "adapter_model.safetensors": b"adapter",
    "additional_chat_templates/run.py": b"raise SystemExit('remote code ran')",
}
SHARDS = {
    "config.json": b'{"model_type": "arcee"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def snapshot(tmp_path: Path, repo: str = "models--org--model") -> Path:
    (folder,) = (tmp_path / "cache" / repo / "snapshots").iterdir()
    return folder


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run_python(code: str, *arguments: str, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if not re.match(r"(?i)hf_|hugging|.*_proxy$", key)}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(
        command, env=env | environment, cwd=PACKAGE_PARENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# Folders


def test_folder_is_returned_without_importing_huggingface_hub(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from arcee_mlx.checkpoint.hub import resolve_folder
        print(resolve_folder(sys.argv[1]))
        assert not {"huggingface_hub", "httpx", "httpx2", "tqdm"} & set(sys.modules)
    """
    assert run_python(code, str(tmp_path)).strip() == str(tmp_path)


def test_existing_folder_wins_over_an_id(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("org/model") == Path("org/model")
    assert not hub.requests


def test_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve_folder("~/model") == tmp_path / "model"


def test_path_object_is_a_folder_and_never_an_id(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    assert resolve_folder(tmp_path) == tmp_path
    with pytest.raises(CheckpointError, match="no such folder"):
        resolve_folder(Path("org/model"))
    assert not hub.requests


def test_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="revision 'main' was given with the local folder.*leave the revision out"):
        resolve_folder(tmp_path, revision="main")


@pytest.mark.parametrize("text", ["a/b/c", "../x", "./x", "/no/x", "~/no-such-x", "models/", "https://host/org/model"])
def test_missing_path_is_no_such_folder(hub: LoopbackHub, text: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder.*expected.*org/name"):
        resolve_folder(text)
    assert not hub.requests


@pytest.mark.parametrize("text", ["", "a b", "a--b", "org/.hidden", "-x", "a..b", "x" * 97, "a\0b", "model.git", "é"])
def test_text_that_is_neither_path_nor_id_is_refused(hub: LoopbackHub, text: str) -> None:
    with pytest.raises(InputError, match="neither an existing folder nor a hub id"):
        resolve_folder(text)
    assert not hub.requests


def test_file_asks_for_the_folder_that_holds_it(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match="no such folder.*give the folder that holds the file"):
        resolve_folder(str(file))
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file; expected a folder.*give the folder that holds it") as error:
        resolve_folder(str(file))
    assert repr(str(tmp_path)) in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("mode", [0o000, 0o300, 0o400])
def test_folder_without_permission_says_so(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    folder.chmod(mode)
    try:
        with pytest.raises(CheckpointError, match="cannot be read.*chmod"):
            resolve_folder(folder)
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("call", ["scandir", "stat"])
def test_folder_that_the_system_refuses_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str) -> None:
    """As macOS refuses Documents: chmod is not the cure, so the message names the other one."""
    real: Callable[..., object] = getattr(os, call)

    def refuse(path: str | os.PathLike[str], *args: object, **kwargs: object) -> object:
        if call == "scandir" or str(path).endswith("/."):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, refuse)
        with pytest.raises(CheckpointError, match="cannot be read.*Operation not permitted.*Privacy & Security"):
            resolve_folder(str(tmp_path))


# Downloads


def test_download_is_byte_equal_and_takes_no_pickle_no_code_and_no_second_copy(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL | UNWANTED)
    folder = resolve_folder("org/model")
    assert contents(folder) == MODEL
    assert sorted(hub.downloads()) == sorted(MODEL)
    assert not {request.file for request in hub.requests} & set(UNWANTED)


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_snapshot_whose_files_are_links_is_a_folder_like_any_other(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    folder = resolve_folder("org/model")
    assert os.path.islink(folder / "model.safetensors")
    assert resolve_folder(folder) == folder
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_sharded_model_comes_whole(hub: LoopbackHub) -> None:
    hub.add("org/model", SHARDS)
    assert contents(resolve_folder("org/model")) == SHARDS


def test_name_without_organisation_is_an_id(hub: LoopbackHub) -> None:
    hub.add("model", MODEL)
    assert contents(resolve_folder("model")) == MODEL


def test_without_weights_only_small_files_are_fetched(hub: LoopbackHub) -> None:
    hub.add("org/model", SHARDS | UNWANTED)
    folder = resolve_folder("org/model", weights=False)
    assert set(contents(folder)) == {"config.json", "tokenizer.json", "model.safetensors.index.json"}


def test_environment_alone_leads_to_the_hub(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.add("org/model", MODEL)
    code = """if True:
        import os
        from arcee_mlx.checkpoint.hub import resolve_folder
        before = dict(os.environ)
        print(resolve_folder("org/model"))
        assert dict(os.environ) == before
    """
    output = run_python(
        code,
        HF_ENDPOINT=hub.url,
        HF_HOME=str(tmp_path / "home"),
    )
    # Standard error is no terminal here: the folder is all that is printed.
    assert contents(Path(output.removesuffix("\n"))) == MODEL


@pytest.mark.parametrize("revision", ["v2", "refs/pr/1", "b" * 40])
def test_revision_selects_branch_tag_or_commit(hub: LoopbackHub, revision: str) -> None:
    hub.add("org/model", MODEL)
    other = MODEL | {"config.json": b'{"vocab_size": 2}'}
    hub.add("org/model", other, commit="b" * 40, branch=revision)
    assert contents(resolve_folder("org/model", revision=revision)) == other
    assert contents(resolve_folder("org/model")) == MODEL


@pytest.mark.parametrize("revision", ["", "../../x", "/x", "a b", "a\nb", "x~1", "a\\b"])
def test_malformed_revision_is_refused(hub: LoopbackHub, revision: str) -> None:
    with pytest.raises(InputError, match="revision is .*; expected a branch"):
        resolve_folder("org/model", revision=revision)
    assert not hub.requests


def test_second_call_downloads_no_file(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    first = resolve_folder("org/model")
    hub.requests.clear()
    assert resolve_folder("org/model") == first
    assert hub.requests
    assert not hub.downloads()


def test_calls_from_many_threads_agree(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(lambda _: resolve_folder("org/model"), range(4)))
    assert len(folders) == 1
    assert contents(folders.pop()) == MODEL


def test_new_commit_is_fetched_and_the_old_one_kept(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    old = resolve_folder("org/model")
    hub.add("org/model", MODEL | {"config.json": b"{}"}, commit="c" * 40)
    hub.requests.clear()
    new = resolve_folder("org/model")
    assert (old / "config.json").read_bytes() == MODEL["config.json"]
    assert (new / "config.json").read_bytes() == b"{}"
    assert "model.safetensors" in contents(new)


def test_download_cut_in_the_middle_goes_on_from_there(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)  # it keeps whole chunks, and they are 10 MB
    hub.add("org/model", MODEL).cut.add("model.safetensors")
    assert contents(resolve_folder("org/model")) == MODEL
    ranges = [request.range for request in hub.requests if request.file == "model.safetensors" and request.range]
    assert ranges == [f"bytes={len(MODEL['model.safetensors']) // 2}-"]


def test_file_that_vanished_from_the_cache_is_fetched_again(hub: LoopbackHub) -> None:
    hub.add("org/model", MODEL)
    folder = resolve_folder("org/model")
    os.remove(os.path.realpath(folder / "model.safetensors"))
    assert contents(resolve_folder("org/model")) == MODEL


# Adapters

ADAPTERS = {
    "peft": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"low rank"},
    "mlx-lm": {"adapter_config.json": b'{"fine_tune_type": "lora"}', "adapters.safetensors": b"low rank"},
}
BESIDE = {
    "adapter_model.bin": b"pickle",
    "0000100_adapters.safetensors": b"halfway through training",
    "checkpoint-100/adapter_model.safetensors": b"halfway through training",
    "model.safetensors": b"merged",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_comes_alone_and_is_found_again_offline(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub.add("org/adapter", {**ADAPTERS[kind], **BESIDE, "README.md": b"# adapter"})
    folder = resolve_folder("org/adapter", adapter=True)
    assert contents(folder) == {**ADAPTERS[kind], "README.md": b"# adapter"}
    go_offline(monkeypatch)
    assert resolve_folder("org/adapter", adapter=True) == folder
    next(folder.glob("adapter*.safetensors")).unlink()
    with pytest.raises(HubError, match="lacks adapter.*safetensors"):
        resolve_folder("org/adapter", adapter=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({**BESIDE, "adapter_config.json": b"{}"}, "has .*adapter_model.bin.*; expected adapter.*.safetensors"),
        ({"adapter_model.safetensors": b""}, "has no adapter_config.json"),
        ({"config.json": b"{}", "model.safetensors": b""}, "has model.safetensors; expected adapter"),
    ],
)
def test_repository_without_an_adapter_is_refused_before_any_download(
    hub: LoopbackHub, files: dict[str, bytes], message: str
) -> None:
    hub.add("org/model", files)
    with pytest.raises(CheckpointError, match=message) as error:
        resolve_folder("org/model", adapter=True)
    assert "as adapter_path" not in str(error.value) and not hub.downloads()


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "drawn"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_is_drawn_on_a_terminal_unless_declined(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool, drawn: bool
) -> None:
    hub.add("org/model", MODEL)
    error_stream = stream()
    monkeypatch.setattr(sys, "stderr", error_stream)
    resolve_folder("org/model", progress=progress)
    assert ("Fetching" in error_stream.getvalue()) == drawn
    assert bool(error_stream.getvalue()) == drawn


def test_declining_progress_changes_nothing_for_other_users_of_the_hub(hub: LoopbackHub) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, tqdm

    hub.add("org/model", MODEL)
    before = dict(os.environ)
    resolve_folder("org/model", progress=False)
    assert not are_progress_bars_disabled()
    with tqdm(total=1, file=io.StringIO()) as bar:
        assert not bar.disable
    assert dict(os.environ) == before


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
