"""FileHasher: the digests hashlib gives, waited for when they are asked for, and no waiting when something failed."""

import hashlib
import os
import threading

import pytest

from arcee_mlx.conversion import hashes
from arcee_mlx.conversion.hashes import FileHasher
from arcee_mlx.errors import CheckpointError


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setattr(hashes, "_CHUNK_BYTES", 1000)
    paths = [tmp_path / f"{size}.safetensors" for size in (0, 1, 1000, 1001, 34_567)]
    for path in paths:
        path.write_bytes(os.urandom(int(path.stem)))
    return paths


def test_digests_are_hashlibs_and_given_once(paths):
    expected = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    with FileHasher() as hasher:
        hasher.add(paths[:2])
        hasher.add(paths[2:])
        assert hasher.digests() == expected
        assert hasher.digests() == {}
        paths[0].write_bytes(b"other")  # the result's file may have the name of the source's
        hasher.add(paths[:1])
        assert hasher.digests() == {paths[0].name: hashlib.sha256(b"other").hexdigest()}


@pytest.mark.parametrize("kind", ["absent", "folder"])
def test_a_file_that_cannot_be_read_is_named_when_the_digests_are_asked_for(paths, tmp_path, kind):
    if kind == "folder":
        (tmp_path / kind).mkdir()
    with FileHasher() as hasher:
        hasher.add([tmp_path / kind, *paths])
        with pytest.raises(CheckpointError, match=rf"{kind}: cannot be read \(.*check the disk"):
            hasher.digests()


def test_a_failure_ends_it_at_once(tmp_path, monkeypatch):
    """It is in the middle of a file without end when the block fails, and has others to do."""
    begun, ended = threading.Event(), []

    class Endless:
        def __init__(self, path, *_args, **_options):
            self.path = path

        def __enter__(self):
            return self

        def __exit__(self, *_):
            ended.append(self.path)

        def read(self, size):
            begun.set()
            return bytes(10)

    monkeypatch.setattr(hashes, "open", Endless, raising=False)
    with pytest.raises(KeyboardInterrupt), FileHasher() as hasher:
        hasher.add([tmp_path / "a", tmp_path / "b"])
        assert begun.wait(60)
        raise KeyboardInterrupt
    assert ended == [tmp_path / "a"]
    assert not [thread for thread in threading.enumerate() if "hash" in thread.name]
