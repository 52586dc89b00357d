"""What resolve_folder finds and fetches, held against huggingface_hub's real download code and a hub on loopback."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from huggingface_hub import constants

from arcee_mlx.checkpoint.hub import resolve_folder
from arcee_mlx.errors import CheckpointError, HubError, InputError

from hub_data import MODEL, SHARDS, UNWANTED, contents, go_offline, run_python
from loopback_hub import LoopbackHub

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
