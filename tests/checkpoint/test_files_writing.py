"""Writing the on-disk format: tensors, shards, JSON, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from arcee_mlx.checkpoint import files
from arcee_mlx.checkpoint.files import (
    WEIGHTS_FILE,
    TensorWriter,
    new_folder,
    open_checkpoint,
    plan_shards,
    read_header,
    write_json,
    write_tensors,
)
from arcee_mlx.errors import CheckpointError, InputError

from sample_tensors import NAMES, tensors


def test_written_file_is_read_by_safetensors_and_mlx(tmp_path: Path) -> None:
    arrays, path = tensors(), tmp_path / "x.safetensors"
    writer = TensorWriter(path, {name: (NAMES[a.dtype], tuple(a.shape)) for name, a in arrays.items()})
    for name in reversed(arrays):  # in any order
        writer.write(name, arrays[name])
    writer.close()
    loaded, metadata = mx.load(str(path), return_metadata=True)
    assert metadata == {"format": "mlx"}
    for name, array in arrays.items():
        assert mx.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype
    with safetensors.safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == set(arrays) and file.metadata() == {"format": "mlx"}
        np.testing.assert_array_equal(file.get_tensor("a"), np.array(arrays["a"]))
    assert list(read_header(path)) == list(arrays)


def test_tensor_written_in_pieces_is_whole(tmp_path: Path) -> None:
    array, path = mx.random.normal((10, 4), key=mx.random.key(0)), tmp_path / "x.safetensors"
    writer = TensorWriter(path, {"x": ("F32", (10, 4)), "y": ("F32", (2, 4))})
    for start, stop in ((0, 3), (3, 4), (4, 10)):
        writer.write("x", array[start:stop])
    writer.write("y", array.T[:2, :4])  # a view that is not contiguous
    writer.close()
    assert mx.array_equal(mx.load(str(path))["x"], array)
    assert mx.array_equal(mx.load(str(path))["y"], array.T[:2, :4])


def test_incomplete_tensor_is_an_error_at_closing(tmp_path: Path) -> None:
    writer = TensorWriter(tmp_path / "x.safetensors", {"x": ("F32", (10,))})
    writer.write("x", mx.ones((9,)))
    with pytest.raises(CheckpointError, match="'x' has 36 bytes; expected 40"):
        writer.close()
    writer.abort()


def test_writer_goes_on_with_a_file_and_leaves_finished_tensors_as_they_are(tmp_path: Path) -> None:
    path, table = tmp_path / "x.safetensors", dict.fromkeys("abc", ("F32", (4, 3)))
    first, second = (mx.random.normal((4, 3), key=mx.random.key(seed)) for seed in (0, 1))
    writer = TensorWriter(path, table)
    writer.write("b", first)
    writer.write("a", first[:2])  # not finished
    writer.abort()
    writer = TensorWriter(path, table, finished=["b"])
    assert [writer.is_complete(name) for name in "abc"] == [False, True, False]
    for name in "ca":
        writer.write(name, second[:1])
        writer.write(name, second[1:])
        assert writer.is_complete(name)
    writer.close()
    loaded = mx.load(str(path))
    assert all(mx.array_equal(loaded[name], values) for name, values in (("a", second), ("b", first), ("c", second)))
    assert list(read_header(path)) == list("abc")


@pytest.mark.parametrize("left", [None, 100, 153, 161])
def test_writer_refuses_to_go_on_with_another_file(tmp_path: Path, left: int | None) -> None:
    path, table = tmp_path / "x.safetensors", {"a": ("F32", (4,)), "b": ("F32", (4,))}
    TensorWriter(path, table).abort()
    size = path.stat().st_size
    if left is None:
        path.unlink()
    else:
        os.truncate(path, left)
    with pytest.raises(CheckpointError, match=f"x.safetensors: is not the file that was begun; expected {size} bytes"):
        TensorWriter(path, table, finished=["a"])
    assert not path.exists() or path.stat().st_size == left
    TensorWriter(path, table).abort()
    assert path.stat().st_size == size


def test_disk_that_takes_a_part_at_a_time_gets_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, position: real(descriptor, data[:7], position))
    write_tensors(tmp_path, tensors())
    loaded = open_checkpoint(tmp_path).arrays()
    assert all(mx.array_equal(loaded[name], array) for name, array in tensors().items())


def test_disk_that_is_full_at_the_header_leaves_no_open_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left"):  # a file left open would be a warning, and that an error
        TensorWriter(tmp_path / "x.safetensors", {"x": ("F32", (4,))})


def test_macos_is_asked_to_write_past_the_drives_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", lambda _, command: asked.append(f"fcntl {command}"))
    monkeypatch.setattr(os, "fsync", lambda _: asked.append("fsync"))
    write_json(tmp_path / "x.json", {})
    assert asked == ["fcntl 51"]

    def refuse(_: int, command: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(files.fcntl, "fcntl", refuse)  # as a network drive does
    write_json(tmp_path / "x.json", {})
    assert asked == ["fcntl 51", "fsync"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EIO])
def test_file_systems_that_cannot_sync_folders_are_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    if number == errno.EINVAL:
        files.sync_folder(tmp_path)
        return
    with pytest.raises(OSError, match="Input/output error"):
        files.sync_folder(tmp_path)


def test_shapes_without_elements_and_without_dimensions_are_written(tmp_path: Path) -> None:
    arrays = {"scalar": mx.array(2.5), "empty": mx.zeros((0, 3)), "x": mx.ones((2,))}
    write_tensors(tmp_path, arrays)
    loaded = open_checkpoint(tmp_path).arrays()
    assert all(
        mx.array_equal(loaded[name], array) and loaded[name].shape == array.shape for name, array in arrays.items()
    )


@pytest.mark.parametrize("sizes", [[], [5], [5, 5], [11], [4, 7, 3, 20, 1]])
def test_shards_keep_order_and_size(sizes: list[int]) -> None:
    table = {f"t{i}": size for i, size in enumerate(sizes)}
    plan = plan_shards(table, shard_bytes=10)
    assert [name for names in plan.values() for name in names] == list(table)
    for names in plan.values():
        assert sum(table[name] for name in names) <= 10 or len(names) == 1
    if len(plan) == 1:
        assert list(plan) == [WEIGHTS_FILE]
    else:
        assert list(plan) == [f"model-{i + 1:05d}-of-{len(plan):05d}.safetensors" for i in range(len(plan))]


def test_json_is_written_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": "é", "a": [1]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert text == '{\n  "b": "é",\n  "a": [\n    1\n  ]\n}\n'


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_inside_leaves_nothing_or_the_old_folder(
    tmp_path: Path, existing: bool, error: type[BaseException]
) -> None:
    path = tmp_path / "new"
    if existing:
        path.mkdir()
        (path / "config.json").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(error), new_folder(path, overwrite=existing) as folder:
        (folder / "config.json").write_text("new")
        raise error
    assert listing(tmp_path) == before
    assert not existing or (path / "config.json").read_text() == "old"


def test_folder_appears_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    path = tmp_path / "parents" / "new"
    with new_folder(path) as folder:
        assert folder.parent == path.parent and not path.exists()
        (folder / "config.json").write_text("new")
    assert listing(tmp_path) == {"parents", "parents/new", "parents/new/config.json"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert path.stat().st_mode == plain.stat().st_mode


def test_existing_folder_is_kept_unless_asked_and_then_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new"
    path.mkdir()
    (path / "config.json").write_text("old")
    (path / "extra").write_text("old")
    with pytest.raises(InputError, match="exists already"), new_folder(path):
        raise AssertionError("the block was entered")
    with new_folder(path, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert listing(tmp_path) == {"new", "new/config.json"} and (path / "config.json").read_text() == "new"


@pytest.mark.parametrize("kind", ["file", "photos", "link"])
def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "new"
    if kind == "file":
        path.write_text("x")
    elif kind == "photos":
        path.mkdir()
        (path / "photo.jpg").write_text("x")
    else:
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "config.json").write_text("x")
        path.symlink_to(tmp_path / "target")
    before = listing(tmp_path)
    with pytest.raises(InputError, match="is no checkpoint folder"), new_folder(path, overwrite=True):
        raise AssertionError("the block was entered")
    assert listing(tmp_path) == before


def test_reader_never_sees_half_a_folder(tmp_path: Path) -> None:
    path, done = tmp_path / "new", threading.Event()
    seen: list[set[str]] = []

    def watch() -> None:
        while not done.is_set():
            try:
                before = path.stat()
                names = set(os.listdir(path))
                after = path.stat()
            except FileNotFoundError:
                continue
            if (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns):  # not replaced meanwhile
                seen.append(names)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            with new_folder(path, overwrite=True) as folder:
                for name in ("config.json", "a", "b"):
                    (folder / name).write_text(name)
    finally:
        done.set()
        watcher.join()
    assert all(names == {"config.json", "a", "b"} for names in seen)
    assert listing(tmp_path) == {"new", "new/config.json", "new/a", "new/b"}
