"""Reading the on-disk format: damaged files, indexes, row slices, content that is compared."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arcee_mlx.checkpoint.files import (
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    open_checkpoint,
    read_columns,
    read_header,
    read_rows,
    same_content,
    write_index,
)
from arcee_mlx.errors import CheckpointError, InputError

from sample_tensors import NAMES, tensors


def write(path: Path, arrays: dict[str, mx.array]) -> Path:
    mx.save_safetensors(str(path), arrays)
    return path


def raw(path: Path, header: Any, data: bytes = b"") -> Path:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def bits(array: mx.array) -> np.ndarray:
    return np.array(array.view(mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array)


def test_header_says_where_every_tensor_lies(tmp_path: Path) -> None:
    path = write(tmp_path / WEIGHTS_FILE, tensors())
    entries, content = read_header(path), path.read_bytes()
    assert entries.keys() == tensors().keys()
    for name, array in tensors().items():
        entry = entries[name]
        assert (entry.shape, entry.dtype, entry.file, entry.nbytes) == (
            tuple(array.shape),
            NAMES[array.dtype],
            path,
            array.nbytes,
        )
        assert content[entry.start : entry.end] == bits(array).tobytes()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"\xff\xfe{}", b""),
        (b"[" * 100_000, b""),
        (b'{"a": ' + b"9" * 5000 + b"}", b""),
        ([ENTRY], b"12345678"),
        ({"a": None}, b""),
        ({"a": []}, b""),
        ({"a": {}}, b""),
        ({"a": {**ENTRY, "dtype": "F64"}}, b"12345678"),
        ({"a": {**ENTRY, "dtype": ["F32"]}}, b"12345678"),
        ({"a": {**ENTRY, "dtype": None}}, b"12345678"),
        ({"a": {**ENTRY, "shape": [3]}}, b"12345678"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"12345678"),
        ({"a": {**ENTRY, "shape": [2.0]}}, b"12345678"),
        ({"a": {**ENTRY, "shape": "2"}}, b"12345678"),
        ({"a": {**ENTRY, "shape": 2}}, b"12345678"),
        ({"a": {**ENTRY, "shape": [10**30]}}, b"12345678"),
        ({"a": {**ENTRY, "data_offsets": [0, 7]}}, b"1234567"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 9]}}, b"12345678"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, b"12345678"),
        ({"a": {**ENTRY, "data_offsets": [1, 9]}}, b"123456789"),
        ({"a": {**ENTRY, "data_offsets": None}}, b"12345678"),
        ({"a": ENTRY}, b"1234567"),
        ({"a": ENTRY}, b"123456789"),
        ({"a": ENTRY, "b": ENTRY}, b"12345678"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, b"123456789012"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [12, 20]}}, b"1" * 20),
        ({"a": {**ENTRY, "shape": [10], "dtype": "U8", "data_offsets": [0, 10]},
          "x.rotary_emb.inv_freq": {"dtype": "F32", "shape": [1], "data_offsets": [10, 5]}}, b"12345"),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_damaged_header_is_a_checkpoint_error_that_names_the_file(tmp_path: Path, header: Any, data: bytes) -> None:
    path = raw(tmp_path / WEIGHTS_FILE, header, data)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    "content", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}", b"\0" * 8]
)
def test_file_without_a_whole_header_is_a_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / WEIGHTS_FILE)


def test_missing_file_and_folder_in_its_place_are_checkpoint_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_header(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_or_cut_file_is_an_error_or_reads_within_its_own_bytes(
    tmp_path_factory: Any, data: st.DataObject
) -> None:
    folder = tmp_path_factory.getbasetemp() / "flips"
    folder.mkdir(exist_ok=True)
    arrays = tensors()
    content = bytearray(write(folder / "whole.safetensors", arrays).read_bytes())
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = folder / WEIGHTS_FILE
    path.write_bytes(content)
    try:
        entries = read_header(path)
    except CheckpointError:
        return
    for entry in entries.values():
        assert header_end <= entry.start <= entry.end <= len(content)
        if entry.dtype in DTYPES and entry.shape:
            got = read_rows(entry, 0, entry.shape[0])
            assert got.shape == entry.shape
            assert bits(got).tobytes() == content[entry.start : entry.end]


def shards(folder: Path) -> dict[str, mx.array]:
    arrays = tensors()
    one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write(folder / one, {name: arrays[name] for name in "abc"})
    write(folder / two, {name: arrays[name] for name in "de"})
    write_index(folder, {one: list("abc"), two: list("de")}, sum(a.nbytes for a in arrays.values()))
    return arrays


def reindex(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads((folder / INDEX_FILE).read_text())
    (folder / INDEX_FILE).write_text(json.dumps(change(values)))


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    arrays = shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.entries) == set(arrays) and len(checkpoint.files) == 2
    loaded = checkpoint.arrays()
    for name, array in arrays.items():
        assert mx.array_equal(loaded[name], array) and loaded[name].dtype == array.dtype


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", ".", "", "a\\b.safetensors", "x.bin", "./x.safetensors",
     "a\0.safetensors", "\ud800.safetensors", "x" * 300 + ".safetensors"],
    ids=repr,
)  # fmt: skip
def test_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    arrays = shards(folder)
    write(tmp_path / "x.safetensors", {"a": arrays["a"]})
    reindex(folder, lambda values: {"weight_map": {**values["weight_map"], "a": name}})
    message = "." if len(name) > 100 or "\0" in name or "\ud800" in name else "do not use this checkpoint"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": None}, {"a": ["x.safetensors"]}], ids=repr)
def test_index_without_a_usable_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    shards(tmp_path)
    reindex(tmp_path, lambda values: {"weight_map": weight_map})
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(tmp_path)


def test_missing_shard_missing_tensor_and_unlisted_tensor_are_named(tmp_path: Path) -> None:
    shards(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    reindex(tmp_path, lambda values: {"weight_map": {**values["weight_map"], "f": second.name}})
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: has no tensor 'f'"):
        open_checkpoint(tmp_path)
    reindex(tmp_path, lambda values: {"weight_map": {k: v for k, v in values["weight_map"].items() if k not in "ef"}})
    with pytest.raises(CheckpointError, match="holds 'e', which"):
        open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00002.safetensors: no such file"):
        open_checkpoint(tmp_path)


def test_one_file_is_preferred_to_an_index(tmp_path: Path) -> None:
    shards(tmp_path)
    write(tmp_path / WEIGHTS_FILE, {"only": mx.ones((1,))})
    assert set(open_checkpoint(tmp_path).entries) == {"only"}


def test_snapshot_of_links_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    arrays = shards(blobs)
    for i, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / f"blob{i}")
    link = tmp_path / "link"
    link.symlink_to(snapshot, target_is_directory=True)
    assert mx.array_equal(open_checkpoint(link).arrays()["d"], arrays["d"])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "weights.npz"])
def test_other_formats_are_named_in_the_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=f"holds {name} .*only safetensors are read"):
        open_checkpoint(tmp_path)


def test_empty_and_absent_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no model.safetensors and no"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_rows_are_the_slices_mlx_loads(tmp_path: Path, dtype: mx.Dtype) -> None:
    array = (mx.random.normal((9, 2, 3), key=mx.random.key(1)) * 100).astype(dtype)
    path = write(tmp_path / WEIGHTS_FILE, {"before": mx.ones((3,)), "x": array, "z": mx.ones((5,))})
    entry, loaded = read_header(path)["x"], mx.load(str(path))["x"]
    for start, stop in ((0, 9), (0, 1), (8, 9), (3, 7), (4, 4), (0, 0), (9, 9)):
        rows = read_rows(entry, start, stop)
        assert rows.dtype == dtype and rows.shape == (stop - start, 2, 3)
        assert np.array_equal(bits(rows), bits(loaded[start:stop]))


def test_rows_keep_every_bit_of_nan_and_infinity(tmp_path: Path) -> None:
    for dtype, numpy in ((mx.bfloat16, np.uint16), (mx.float16, np.uint16), (mx.float32, np.uint32)):
        pattern = np.array([0x7FC1, 0x7F80, 0xFFFF, 0x8000, 1], numpy) * (1 if numpy is np.uint16 else 65536)
        path = write(tmp_path / WEIGHTS_FILE, {"x": mx.array(pattern).view(dtype)})
        assert np.array_equal(np.array(read_rows(read_header(path)["x"], 0, 5).view(mx.array(pattern).dtype)), pattern)


@pytest.mark.parametrize(("start", "stop"), [(0, 10), (-1, 2), (5, 3), (9, 12)])
def test_rows_outside_the_tensor_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    # The bytes that follow are those of another tensor: reading on would give wrong numbers without a word.
    path = write(tmp_path / WEIGHTS_FILE, {"x": mx.ones((9, 2)), "z": mx.zeros((50,))})
    with pytest.raises((CheckpointError, InputError, ValueError), match="row"):
        read_rows(read_header(path)["x"], start, stop)


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_columns_are_the_transposed_slices_of_the_matrix(tmp_path: Path, dtype: mx.Dtype) -> None:
    array = (mx.random.normal((5, 13), key=mx.random.key(1)) * 100).astype(dtype)
    path = write(tmp_path / WEIGHTS_FILE, {"before": mx.ones((3,)), "x": array, "z": mx.ones((5,))})
    entry, whole = read_header(path)["x"], bits(array).T
    for start, stop in ((0, 13), (0, 1), (12, 13), (4, 8), (8, 12), (7, 7), (13, 13)):
        columns = read_columns(entry, start, stop)
        assert columns.dtype == dtype and columns.shape == (stop - start, 5)
        assert np.array_equal(bits(columns), whole[start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 14), (-1, 2), (5, 3)])
def test_columns_outside_the_matrix_are_refused(tmp_path: Path, start: int, stop: int) -> None:
    path = write(tmp_path / WEIGHTS_FILE, {"x": mx.ones((5, 13))})
    with pytest.raises(InputError, match="of 'x'; expected a range within its 13 columns"):
        read_columns(read_header(path)["x"], start, stop)


@pytest.mark.parametrize("read", [read_rows, read_columns])
def test_file_cut_after_it_was_checked_is_a_checkpoint_error(tmp_path: Path, read: Callable[..., mx.array]) -> None:
    path = write(tmp_path / WEIGHTS_FILE, {"x": mx.ones((9, 9))})
    entry = read_header(path)["x"]
    os.truncate(path, entry.end - 1)
    with pytest.raises(CheckpointError, match="ends inside 'x'"):
        read(entry, 0, 9)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read 'x' \(No such file or directory\); check the disk"):
        read(entry, 0, 9)


def test_content_is_compared_to_the_bit(tmp_path: Path) -> None:
    x = mx.array([[1.0, float("nan")], [0.0, 3.0]])
    other, negative = mx.array(x), mx.array(x)
    other[1, 1] = 4.0
    negative[1, 0] = -0.0
    arrays = {
        "x": x,
        "same": mx.array(x),
        "other": other,
        "negative": negative,
        "half": x.astype(mx.float16),
        "flat": x.reshape(-1),
    }
    entries = read_header(write(tmp_path / WEIGHTS_FILE, arrays))
    assert {name for name in arrays if same_content(entries["x"], entries[name])} == {"x", "same"}


def test_content_of_scalars_is_compared_too(tmp_path: Path) -> None:
    entries = read_header(
        write(tmp_path / WEIGHTS_FILE, {"x": mx.array(1.0), "same": mx.array(1.0), "other": mx.array(2.0)})
    )
    assert same_content(entries["x"], entries["same"])
    assert not same_content(entries["x"], entries["other"])
