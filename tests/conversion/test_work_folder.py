"""The folder a conversion is made in: one process at a time, a journal that is never believed too much, a safe rename."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arcee_mlx.conversion import work_folder
from arcee_mlx.conversion.work_folder import measure_disk, open_work_folder, recover
from arcee_mlx.errors import ConversionError, InputError

IDENTITY = {"source": "a"}
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def folder(tmp_path):
    """The work folder."""
    return tmp_path / ".out.partial"


def write_model(folder, text="new"):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)


def leave_work(target, *names, identity=IDENTITY, overwrite=False):
    """Unfinished work in which `names` are finished."""
    with (
        pytest.raises(KeyboardInterrupt),
        open_work_folder(target, identity, overwrite=overwrite) as work,
    ):
        write_model(work.model)
        for name in names:
            work.finish(name, {}, lambda: None)
        work.commit(lambda: None)
        raise KeyboardInterrupt


def finish_work(target, identity=IDENTITY, *, overwrite=False):
    """Ends a conversion; returns what was finished when it began."""
    with open_work_folder(target, identity, overwrite=overwrite) as work:
        finished = set(work.finished)
        assert work.resumed == bool(finished)
        write_model(work.model)
        work.publish()
    assert (target / "config.json").read_text() == "new"
    assert os.listdir(target.parent) == ["out"]
    return finished


def test_a_folder_that_is_finished_has_its_name_and_the_usual_permissions(target, tmp_path):
    assert finish_work(target) == set()
    (tmp_path / "plain").mkdir()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FULL, InputError("the name is taken")])
def test_work_is_kept_for_the_same_conversion_if_something_is_finished(target, folder, error):
    for names in ((), ("a", "b")):
        with pytest.raises(type(error)), open_work_folder(target, IDENTITY) as work:
            for name in names:
                work.finish(name, {"error": 0.5}, lambda: None)
            work.commit(lambda: None)
            raise error
        assert folder.exists() == bool(names) and not target.exists()
    with open_work_folder(target, IDENTITY) as work:
        assert work.finished == {"a": {"error": 0.5}, "b": {"error": 0.5}}


@pytest.mark.parametrize("error", [ConversionError("NaN"), RuntimeError("a mistake of ours")])
def test_work_that_failed_for_what_it_is_leaves_nothing(target, tmp_path, error):
    leave_work(target, "a")
    with pytest.raises(type(error)), open_work_folder(target, IDENTITY) as work:
        work.finish("b", {}, lambda: None)
        work.commit(lambda: None)
        raise error
    assert not list(tmp_path.iterdir())


def test_other_work_is_refused_with_advice_and_thrown_away_only_with_force(target, folder):
    leave_work(target, "a")
    with pytest.raises(ConversionError, match=r"\.out\.partial: holds an unfinished.*repeat that command.*--force"):
        finish_work(target, {"source": "b"})
    assert (folder / "model/config.json").exists()
    assert finish_work(target, {"source": "b"}, overwrite=True) == set()


def test_force_goes_on_with_work_of_its_own(target):
    leave_work(target, "a", overwrite=True)
    assert finish_work(target, overwrite=True) == {"a"}


def test_other_work_without_a_finished_tensor_is_in_nobodys_way(target, folder):
    leave_work(target, "a")
    journal = folder / "journal"
    journal.write_text(journal.read_text().split("\n")[0] + "\n")
    assert finish_work(target, {"source": "b"}) == set()


TORN = ["", "[", '["c"', '["c",{}]', '["c",{}', '["c",{"rows":"AAAA']


@pytest.mark.parametrize("end", [*TORN, '["c"]\n', "\0\0\0\n", "5\n", '["c",5]\n', '[["c"],{}]x\n', "\xff\n", "\n"])
def test_a_journal_is_read_as_far_as_it_is_whole_and_goes_on_from_there(target, folder, end):
    leave_work(target, "a", "b")
    with open(folder / "journal", "ab") as journal:
        journal.write(end.encode("latin-1") + (b'["d",{}]\n' if end.endswith("\n") else b""))
    leave_work(target, "e")
    assert finish_work(target) == {"a", "b", "e"}


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\0" * 100, b"\xff\n", b"torn"])
def test_work_without_a_readable_journal_starts_over(target, folder, content):
    leave_work(target, "a")
    (folder / "journal").unlink()
    if content is not None:
        (folder / "journal").write_bytes(content)
    assert finish_work(target) == set()


def test_a_work_folder_without_a_model_starts_over(target, folder):
    leave_work(target, "a")
    shutil.rmtree(folder / "model")
    assert finish_work(target) == set()


def test_what_could_not_be_made_lasting_is_never_noted(target):
    """After a failed fsync the system forgets what it could not write: the next fsync reports success."""
    failures = [FULL]

    def sync():
        if failures:
            raise failures.pop()

    with pytest.raises(OSError), open_work_folder(target, IDENTITY) as work:
        work.finish("a", {}, lambda: None)
        work.commit(lambda: None)
        work.finish("b", {}, sync)
        try:
            work.commit(sync)
        finally:
            work.commit(sync)
    assert finish_work(target) == {"a"}


def test_finished_tensors_are_noted_at_intervals_and_after_their_bytes(target, folder, monkeypatch):
    now, synced = [0.0], []
    monkeypatch.setattr(work_folder.time, "monotonic", lambda: now[0])
    with open_work_folder(target, IDENTITY) as work:

        def sync():
            synced.append((folder / "journal").read_text().count("\n"))

        work.finish("a", {}, sync)
        assert not synced and not work.finished
        now[0] = work_folder.COMMIT_EVERY_S
        work.finish("b", {}, sync)
        assert synced == [1] and work.finished.keys() == {"a", "b"}
        assert (folder / "journal").read_text().endswith('\n["a",{}]\n["b",{}]\n')
        work.finish("c", {}, sync)
        assert synced == [1]


def test_the_journal_goes_before_what_it_speaks_of(target, folder, monkeypatch):
    leave_work(target, "a")
    removed = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append((path.name, (folder / "journal").exists())))
    with pytest.raises(ConversionError), open_work_folder(target, IDENTITY):
        raise ConversionError("NaN")
    assert removed == [("model", False)]


# What a kill in publish leaves, with an older checkpoint: the names in the work folder, and whether `out` is there.
@pytest.mark.parametrize(
    ("left", "is_there", "then"),
    [
        (["model", "journal", "old"], False, "older"),  # between the renames
        (["journal", "old"], True, "new"),  # after them
        (["journal"], True, "new"),
        (["old"], True, "new"),
        ([], True, "new"),
    ],
)
@pytest.mark.parametrize("refused_by", ["open_work_folder", "recover"])
def test_a_kill_in_the_middle_of_publishing_is_put_in_order(target, folder, left, is_there, then, refused_by):
    leave_work(target, "a")
    write_model(folder / "old", "older")
    if is_there:
        os.replace(folder / "model", target)
    for path in folder.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if refused_by == "recover":
        recover(target)
    else:
        with pytest.raises(InputError, match="exists already"):
            finish_work(target)
    assert (target / "config.json").read_text() == then
    assert folder.exists() == (not is_there)
    assert finish_work(target, overwrite=True) == (set() if is_there else {"a"})


def test_recovering_leaves_unfinished_work_and_makes_nothing(target, folder, tmp_path):
    recover(tmp_path / "no/such/folder")
    assert not list(tmp_path.iterdir())
    leave_work(target, "a")
    recover(target)
    assert finish_work(target) == {"a"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_rename_brings_the_older_checkpoint_back(target, folder, monkeypatch, overwrite):
    if overwrite:
        write_model(target, "older")
    real = os.replace

    def fail(source, goal):
        if Path(goal) == target and Path(source).name == "model":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, goal)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError), open_work_folder(target, IDENTITY, overwrite=overwrite) as work:
        write_model(work.model)
        work.finish("a", {}, lambda: None)
        work.commit(lambda: None)
        work.publish()
    monkeypatch.undo()
    assert target.exists() == overwrite and (not overwrite or (target / "config.json").read_text() == "older")
    assert finish_work(target, overwrite=overwrite) == {"a"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_got_the_name_meanwhile_is_not_overwritten(target, overwrite):
    with pytest.raises(InputError), open_work_folder(target, IDENTITY, overwrite=overwrite) as work:
        write_model(work.model)
        work.finish("a", {}, lambda: None)
        work.commit(lambda: None)
        target.mkdir()
        (target / "cat.jpg").write_text("cat")
        work.publish()
    assert [path.name for path in target.iterdir()] == ["cat.jpg"]
    shutil.rmtree(target)
    assert finish_work(target, overwrite=overwrite) == {"a"}


def test_an_older_checkpoint_of_a_kill_is_not_in_the_way_of_the_next(target, folder):
    leave_work(target, "a")
    write_model(folder / "old", "oldest")
    write_model(target, "older")
    assert finish_work(target, overwrite=True) == {"a"}


def test_a_folder_removed_while_it_was_to_be_locked_is_made_again(target, folder, monkeypatch):
    real, calls = os.open, []

    def open_late(path, *args, **options):
        if Path(path) == folder and len(calls) < 3:
            calls.append(path)
            folder.rmdir()
            if len(calls) == 2:  # another one has taken its place
                descriptor = os.open(target.parent, *args)
                folder.mkdir()
                return descriptor
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", open_late)
    assert finish_work(target) == set() and len(calls) == 3


HOLD = """
import sys
from pathlib import Path
from arcee_mlx.conversion.work_folder import open_work_folder
with open_work_folder(Path(sys.argv[1]), {"source": "a"}) as work:
    (work.model / "config.json").write_text("new")
    work.finish("a", {}, lambda: None)
    work.commit(lambda: None)
    print("held", flush=True)
    sys.stdin.readline()
    work.publish()
"""


@pytest.fixture
def holder(target):
    """Another process in the middle of the same conversion, which ends it when it is given a line."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(target)], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:  # fmt: skip
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_conversion_at_once_is_refused_and_harms_nothing(target, folder, holder):
    for overwrite in (False, True):
        for identity in (IDENTITY, {"source": "b"}):
            with pytest.raises(ConversionError, match=r"\.out\.partial: another conversion is being written there"):
                finish_work(target, identity, overwrite=overwrite)
        with pytest.raises(ConversionError, match="another conversion"):
            recover(target)
    holder.communicate("\n")
    assert holder.returncode == 0 and (target / "config.json").read_text() == "new"
    assert os.listdir(target.parent) == ["out"]


def test_a_killed_process_lets_go(target, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert finish_work(target) == {"a"}


def test_disk_that_unfinished_work_takes_is_counted(target, folder):
    assert measure_disk(target) == 0
    leave_work(target, "a")
    (folder / "model/sub").mkdir()
    (folder / "model/sub/x").write_bytes(bytes(10**6))
    with open(folder / "model/sparse", "wb") as file:
        file.truncate(10**9)
    assert 10**6 <= measure_disk(target) < 2 * 10**6


def test_disk_is_counted_while_another_process_removes_it(target, monkeypatch):
    leave_work(target, "a")
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    monkeypatch.setattr(Path, "rglob", lambda self, _: [self / "gone"])
    assert measure_disk(target) == 0
