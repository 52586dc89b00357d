"""Reading a JSON object from a file: what is refused, and that nothing hangs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from arcee_mlx.errors import CheckpointError
from arcee_mlx.model import json_file
from arcee_mlx.model.json_file import read_json


def test_an_object_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": {"a": [1, null]}, "é": "\\u00e9", "deep": ' + "[" * 40 + "]" * 40 + "}", encoding="utf-8")
    assert read_json(path)["a"] == {"a": [1, None]} and read_json(path)["é"] == "é"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "a": 1}', "the key 'a' twice"),
        (b'{"x": {"a": 1, "b": 2, "\\u0061": 3}}', "the key 'a' twice"),
        (b'[{"b": 1, "b": 2}]', "the key 'b' twice"),
        (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested too deeply"),
        (b'{"a": ' * 300 + b"1" + b"}" * 300, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ("{}".encode("utf-16"), "utf-8"),
    ],
)
def test_what_readers_would_take_differently_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json: cannot be read .*{says}"):
        read_json(tmp_path / "x.json")


def test_a_file_without_end_is_not_read_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 1000)
    (tmp_path / "x.json").write_bytes(b"{}" + b" " * 998)
    assert read_json(tmp_path / "x.json") == {}
    os.truncate(tmp_path / "x.json", 2**40)
    with pytest.raises(CheckpointError, match="more than 1000 bytes"):
        read_json(tmp_path / "x.json")


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, kind in ((tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(CheckpointError, match=f"it is {kind}"):
            read_json(path)
