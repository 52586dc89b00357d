"""Links in a checkpoint folder: what may stand for a file of it, and what may not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcee_mlx.checkpoint.links import check_file, check_links, find_files
from arcee_mlx.errors import CheckpointError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "private.txt").write_text("secret")
    return tmp_path / "model"


def link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    return path


def test_files_are_found_by_pattern_in_order_and_folders_are_passed_over(folder: Path) -> None:
    names = ["LICENSE", "LICENSE.txt", "templates/a.jinja", "tokenizer.json", "tokenizer_config.json"]
    for name in [*names, "license", ".tokenizer.json", "templates/a.txt", "LICENSES/MIT.txt", "weights.bin"]:
        write(folder / name)
    found = find_files(folder, ["tokenizer*.json", "LICENSE*", "templates/*.jinja", "absent", "nowhere/*", "LICENSE"])
    assert found == [folder / name for name in names]


def test_a_link_may_lead_to_its_like_into_the_folder_or_to_a_blob_of_a_cache(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "disk/config.json")
    check_file(link(folder / "config.json", "../disk/config.json"), folder)
    write(folder / "kept/v2.json")
    check_file(link(folder / "tokenizer.json", "kept/v2.json"), folder)
    cache = tmp_path / "models--org--name"
    write(cache / "blobs/0123")
    (cache / "snapshots/abc").mkdir(parents=True)
    check_file(link(cache / "snapshots/abc/LICENSE", "../../blobs/0123"), cache / "snapshots/abc")
    check_file(link(folder / "LICENSE", "../models--org--name/snapshots/abc/LICENSE"), folder)


def test_a_blob_may_be_shared_by_the_models_of_a_cache(tmp_path: Path) -> None:
    blob, snapshot = tmp_path / "models--org--name/blobs/etag", tmp_path / "models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir()
    write(tmp_path / "blobs/01/0123")
    link(snapshot / "LICENSE", "../../blobs/etag")
    link(blob, "../../blobs/01/0123")
    with pytest.raises(CheckpointError, match="blobs/01/0123; expected"):
        check_file(snapshot / "LICENSE", snapshot)
    write(tmp_path / "blobs/.huggingface-shared-blobs")
    check_file(snapshot / "LICENSE", snapshot)


def test_a_folder_that_is_reached_by_a_link_is_the_folder_itself(folder: Path, tmp_path: Path) -> None:
    write(folder / "kept.json")
    link(folder / "config.json", "kept.json")
    check_file(link(tmp_path / "other", "model") / "config.json", tmp_path / "other")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("../private.txt", "private.txt; expected"),
        ("sub/../../private.txt", "private.txt; expected"),
        ("../blobs/0123", "blobs/0123; expected"),
        ("../absent/x", "absent/x, which is not there"),
        ("tokenizer.json", "out of reach"),
        ("../model", "which is a folder"),
        ("/dev/null", "/dev/null, which is a device"),
        ("../pipe", "pipe, which is a pipe"),
    ],
)
def test_other_links_are_errors_that_say_where_they_lead(folder: Path, tmp_path: Path, target: str, says: str) -> None:
    write(folder / "sub/x")
    write(tmp_path / "blobs/0123")
    os.mkfifo(tmp_path / "pipe")
    path = link(folder / "tokenizer.json", target)
    with pytest.raises(CheckpointError) as error:
        check_file(path, folder)
    assert str(error.value).startswith(f"{path}: is a link to ") and says in str(error.value)
    with pytest.raises(CheckpointError):
        find_files(folder, ["tokenizer*.json"])


def test_no_name_inside_the_folder_opens_a_way_out(folder: Path) -> None:
    link(folder / "private.txt", "../private.txt")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is a link to .*private\.txt; expected"):
        check_file(link(folder / "tokenizer.json", "private.txt"), folder)
    (folder / "blobs").mkdir()
    (folder / "snapshots").mkdir()
    link(folder / "blobs/0", "../../private.txt")
    with pytest.raises(CheckpointError, match=r"LICENSE: is a link to .*private\.txt; expected"):
        check_file(link(folder / "LICENSE", "blobs/0"), folder)


@pytest.mark.parametrize("target", ["../elsewhere", "sub/../..", "absent", "templates"])
def test_a_folder_of_templates_elsewhere_is_refused(folder: Path, tmp_path: Path, target: str) -> None:
    for name in ("model/sub/x", "elsewhere/a.jinja", "a.jinja"):
        write(tmp_path / name)
    link(folder / "templates", target)
    with pytest.raises(CheckpointError, match="templates"):
        find_files(folder, ["templates/*.jinja"])


def test_a_file_that_may_not_be_read_is_refused_before_it_is_copied(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder / "LICENSE")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match=r"LICENSE: is not readable"):
        check_file(path, folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_config_weights_and_index_are_checked(folder: Path, name: str) -> None:
    check_links(folder)
    link(folder / name, "../private.txt")
    with pytest.raises(CheckpointError, match=rf"{name}: is a link to"):
        check_links(folder)


def test_the_shards_of_an_index_are_checked_and_no_others(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "one.safetensors"}}')
    link(folder / "two.safetensors", "../private.txt")
    check_links(folder)
    link(folder / "one.safetensors", "../private.txt")
    with pytest.raises(CheckpointError, match=r"one\.safetensors: is a link to"):
        check_links(folder)
