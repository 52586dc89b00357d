"""What stops a conversion from outside is said clearly, leaves nothing that looks finished, and keeps the work done."""

import builtins
import errno
import json
import os
import shutil
import signal

import mlx.core as mx
import pytest

from arcee_mlx import load_model
from arcee_mlx.checkpoint import files
from arcee_mlx.conversion import quantize, run, work_folder
from arcee_mlx.conversion.progress import Quiet
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.run import convert
from arcee_mlx.errors import CheckpointError, ConversionError

from conversion_data import FLOAT, assert_nothing_left, write_source

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(autouse=True)
def small_slices_and_shards(monkeypatch):
    """Several slices a tensor, several files, and every tensor noted at once."""
    monkeypatch.setattr(quantize, "SLICE_BYTES", 6_000)
    monkeypatch.setattr(run, "plan_shards", lambda sizes: files.plan_shards(sizes, 30_000))
    monkeypatch.setattr(work_folder, "COMMIT_EVERY_S", 0.0)
    monkeypatch.setattr(run, "write_picture", lambda *_: None)  # as where matplotlib is not installed, and quicker


@pytest.fixture
def source(tmp_path):
    folder = write_source(tmp_path / "in", shards=2, **SIZES)
    (folder / "tokenizer.json").write_text("{}")
    return folder


class Names(Quiet):
    """Remembers what was converted, which is not what was checked after."""

    def __init__(self):
        self.names = set()

    def begin(self, stage, total_bytes, done_bytes=0):
        self.stage = stage

    def advance(self, tensor, done_bytes):
        if self.stage == "convert":
            self.names.add(tensor)


def convert_names(*args, **options):
    """Converts; returns the names of the tensors that were worked on."""
    reporter = Names()
    convert(*args, **options, reporter=reporter)
    return reporter.names


def read_files(folder):
    """All that the promise of equal bytes is about: conversion.json says how long it took."""
    files = (path for path in folder.iterdir() if path.suffix in (".safetensors", ".json"))
    return {path.name: path.read_bytes() for path in files if path.name != "conversion.json"}


def fail_at(monkeypatch, owner, name, number, error, *, only=lambda *_: True):
    """Lets one call of a function raise an error, by number; returns the list of calls."""
    real, calls = getattr(owner, name, None) or getattr(builtins, name), []

    def fail(*args, **options):
        if only(*args):
            calls.append(args)
            if len(calls) == number:
                error()
        return real(*args, **options)

    monkeypatch.setattr(owner, name, fail, raising=False)
    return calls


def raise_error(number):
    def error():
        raise OSError(number, os.strerror(number))

    return error


def interrupt():
    signal.raise_signal(signal.SIGINT)


def assert_goes_on(tmp_path, source, *, overwrite=False):
    """The next run gives the bytes of an undisturbed one without converting all again, and leaves nothing else."""
    converted = convert_names(source, tmp_path / "out", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert converted < convert_names(source, tmp_path / "again")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "again")


# Negative numbers are counted from the end; the very last fsync is of the final name, which is no reason to take it back.
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("call", "number"), [("pwrite", 30), ("pwrite", -1), ("fsync", 20), ("fsync", -2), ("replace", -1)]
)
def test_a_full_disk_keeps_the_work(tmp_path, source, monkeypatch, call, number, overwrite):
    with monkeypatch.context() as patch:
        calls = fail_at(patch, os, call, None, None)
        convert(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    if overwrite:
        convert(source, tmp_path / "out", FLOAT)
    if number < 0:
        number += len(calls) + 1 + (overwrite and call == "replace")  # the older one is moved, too
    with monkeypatch.context() as patch:
        fail_at(patch, os, call, number, raise_error(errno.ENOSPC))
        with pytest.raises(ConversionError, match=r"No space left on device.*0\.02 GB.*run the same command again"):
            convert(source, tmp_path / "out", overwrite=overwrite)
    assert sorted(os.listdir(tmp_path)) == sorted([".out.partial", "in", *["out"] * overwrite])
    if overwrite:
        assert load_model(tmp_path / "out").config.quantization is None
    assert_goes_on(tmp_path, source, overwrite=overwrite)


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace"])
def test_a_full_disk_leaves_nothing_where_nothing_was_finished(tmp_path, source, monkeypatch, call):
    fail_at(monkeypatch, os, call, 1, raise_error(errno.ENOSPC))
    with pytest.raises(ConversionError, match="No space left on device"):
        convert(source, tmp_path / "out")
    assert_nothing_left(tmp_path)


def test_a_name_that_cannot_be_made_lasting_is_still_the_name(tmp_path, source, monkeypatch):
    fail_at(monkeypatch, work_folder, "sync_folder", 3, raise_error(errno.EIO))  # journal, model, and the parent's
    convert(source, tmp_path / "out")
    assert load_model(tmp_path / "out") and sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_a_source_that_cannot_be_read_keeps_the_work(tmp_path, source, monkeypatch):
    with monkeypatch.context() as patch:
        calls = fail_at(patch, files, "open", 20, raise_error(errno.EIO), only=lambda _path, mode, *_: mode == "rb")
        with pytest.raises(
            CheckpointError, match=r"in/model.*cannot read '.*Input/output error.*check the disk"
        ) as seen:
            convert(source, tmp_path / "out")
    assert isinstance(seen.value.__cause__, OSError) and len(calls) == 20
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "in"]
    assert_goes_on(tmp_path, source)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(quantize, "read_rows", 20), (work_folder, "sync_file", 9), (run, "write_card", 1), (run, "check_result", 1)],
)
def test_ctrl_c_keeps_the_work(tmp_path, source, monkeypatch, owner, name, number):
    with monkeypatch.context() as patch:
        fail_at(patch, owner, name, number, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == [".out.partial", "in"]
    assert_goes_on(tmp_path, source)


def test_ctrl_c_notes_what_was_finished_since_the_last_interval(tmp_path, source, monkeypatch):
    monkeypatch.setattr(work_folder, "COMMIT_EVERY_S", 1e9)
    with monkeypatch.context() as patch:
        fail_at(patch, quantize, "read_rows", 20, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    assert_goes_on(tmp_path, source)


def test_ctrl_c_leaves_nothing_where_nothing_was_finished(tmp_path, source, monkeypatch):
    fail_at(monkeypatch, quantize, "read_rows", 1, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.fixture
def half_done(tmp_path, source, monkeypatch):
    """Unfinished work beside the source."""
    with monkeypatch.context() as patch:
        fail_at(patch, quantize, "read_rows", 20, interrupt)
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out")
    return tmp_path / ".out.partial"


def test_a_source_that_fails_for_its_content_leaves_nothing_of_earlier_runs_either(tmp_path, source, half_done):
    with pytest.raises(ConversionError, match="unfinished"):
        convert(source, tmp_path / "out", Recipe(quantization=None))
    poison(source)
    with pytest.raises(ConversionError, match="holds Inf or NaN"):
        convert(source, tmp_path / "out", overwrite=True)
    assert_nothing_left(tmp_path)


def poison(source):
    """Puts a NaN into the last tensor that is read."""
    for path in source.glob("*.safetensors"):
        weights = dict(mx.load(str(path)))
        if "model.norm.weight" in weights:
            weights["model.norm.weight"][3] = float("nan")
            mx.save_safetensors(str(path), weights, metadata={"format": "pt"})


def change_time(source, name):
    stat = (source / name).stat()
    os.utime(source / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))


def change_config(source):
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | {"hidden_act": "silu"}))


CHANGES = {
    "weights": lambda source: change_time(source, "model-00002-of-00002.safetensors"),
    "tokenizer": lambda source: (source / "tokenizer.json").write_text('{"a": 1}'),
    "one file less": lambda source: (source / "tokenizer.json").unlink(),
    "config": change_config,
}


@pytest.mark.parametrize("change", CHANGES)
def test_work_on_another_source_is_refused_and_force_starts_over(tmp_path, source, half_done, change):
    CHANGES[change](source)
    with pytest.raises(ConversionError, match="unfinished conversion of another source.*--force to throw it away"):
        convert(source, tmp_path / "out")
    assert half_done.exists()
    assert convert_names(source, tmp_path / "out", overwrite=True) == convert_names(source, tmp_path / "again")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "again")


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": Recipe(quantization=Quantization(bits=8))},
        {"recipe": Recipe(dtype="float32")},
        {"recipe": Recipe(layout="standard")},
        {"allow_nonfinite": True},
    ],
    ids=["bits", "dtype", "layout", "allow_nonfinite"],
)
def test_work_with_other_options_is_refused_and_force_starts_over(tmp_path, source, half_done, options):
    with pytest.raises(ConversionError, match="another source, recipe or version.*repeat that command to finish it"):
        convert(source, tmp_path / "out", **options)
    assert convert_names(source, tmp_path / "out", overwrite=True, **options) == convert_names(
        source, tmp_path / "again", **options
    )


def test_a_recipe_that_says_the_same_in_other_words_goes_on(tmp_path, source, half_done):
    form = Quantization(bits=4, group_size=64)
    recipe = Recipe(quantization=form, name="mine", dtype="bfloat16", layout="by_neuron")
    assert convert_names(source, tmp_path / "out", recipe) < convert_names(source, tmp_path / "again", recipe)


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_files_that_are_not_what_was_begun_are_an_error_and_the_next_run_starts_over(
    tmp_path, source, half_done, damage
):
    shard = sorted(half_done.glob("model/*.safetensors"))[0]
    shard.unlink() if damage == "gone" else os.truncate(shard, 1000)
    with pytest.raises(CheckpointError, match="is not the file that was begun"):
        convert(source, tmp_path / "out")
    assert_nothing_left(tmp_path)
    convert(source, tmp_path / "out")


def test_a_conversion_that_is_held_by_another_is_refused_before_the_source_is_looked_at(tmp_path):
    with (
        work_folder.open_work_folder(tmp_path / "out", {}),
        pytest.raises(ConversionError, match="another conversion is being written there"),
    ):
        convert(tmp_path / "no such source", tmp_path / "out")


def test_what_a_kill_left_beside_a_complete_checkpoint_goes_with_the_next_run(tmp_path, source):
    convert(source, tmp_path / "out")
    (tmp_path / ".out.partial/old").mkdir(parents=True)
    with pytest.raises(Exception, match="exists already"):
        convert(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
