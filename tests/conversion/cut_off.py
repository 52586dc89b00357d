"""Kills conversions at chosen lines, runs each a second time, and says of each what was wrong with what it left.

    python tests/conversion/cut_off.py FOLDER COUNT [--rename-early]

FOLDER holds a source for each of `CASES`. Lines are those of the conversion and of checkpoint/files.py, counted as they
are executed; COUNT of them are drawn at random, and all those around the renames come on top. Prints a JSON object a
kill. Every conversion runs in a process of its own, forked where that is safe from this one, which never uses MLX.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a program, from any folder

import mlx.core as mx

from arcee_mlx.checkpoint import files
from arcee_mlx.conversion import quantize, run, work_folder
from arcee_mlx.conversion.progress import Quiet
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.errors import ArceeError

TEXT = "text.txt"  # of FOLDER
CASES: dict[str, dict[str, Any]] = {
    "4bit": {"recipe": Recipe(layout="standard")},
    "by_neuron": {"recipe": Recipe(layout="by_neuron", quantization=Quantization(bits=8, group_size=32))},
    "folded": {"recipe": Recipe(dtype="float16", layout="standard")},
    "calibrated": {"calibrate": TEXT, "verify": TEXT, "num_samples": 5, "sequence_length": 16},
}
_TRACED = (str(Path(run.__file__).parent) + os.sep, files.__file__)
_AROUND_RENAMES = ("publish", "_settle", "_clear")
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")


@dataclass(frozen=True)
class Kill:
    """A conversion that was killed, and the one after it.

    Attributes:
        case: one of `CASES`.
        overwrite: whether there was an older checkpoint to be replaced.
        line, lines: number of lines that were executed, and that an undisturbed conversion executes.
        place: the last one, such as "run.py:120 convert".
        left: what had the final name: "nothing", the "older" checkpoint, the "new" one, or "ruins".
        finished, converted: number of tensors that the journal named, and that the second conversion worked on.
        problem: what was wrong; "" for nothing.
    """

    case: str
    overwrite: bool
    line: int
    lines: int
    place: str
    left: str
    finished: int
    converted: int
    problem: str


class Drill:
    """One of `CASES`, with or without an older checkpoint to be replaced."""

    def __init__(self, root: Path, case: str, *, overwrite: bool, rename_early: bool) -> None:
        """Converts undisturbed, to know what must come out, and at which of its lines a conversion can be killed."""
        self.case, self.overwrite = case, overwrite
        self._root, self._backup = root / f"{case}-{overwrite}", root / f"{case}-older"
        self._root.mkdir()
        (self._root / "in").symlink_to(root / case)
        options = CASES[case] | {"overwrite": overwrite}
        options |= {name: root / TEXT for name, value in options.items() if value == TEXT}
        self._convert = partial(convert, self._root, options, rename_early=rename_early)
        self._older: dict[str, str] | None = None
        if overwrite:
            run_apart(partial(convert, self._root, {"recipe": Recipe(quantization=None)}))
            os.replace(self._root / "out", self._backup)
            self._older = digest(self._backup)
        self._reset()
        undisturbed = run_apart(partial(self._convert, traced=True))
        self._tensors = set(undisturbed["converted"])
        self._new = digest(self._root / "out")
        self.places: list[str] = undisturbed["places"]

    def kill(self, line: int) -> Kill:
        """Kills a conversion, looks at what it left, and converts once more."""
        self._reset()
        place = run_apart(partial(self._convert, kill_at=line))
        finished = self._read_journal()
        found = digest(self._root / "out")
        left = "nothing" if found is None else "new" if found == self._new else "ruins"
        if self.overwrite and found == self._older:
            left = "older"
        converted: set[str] = set()
        if place != self.places[line - 1]:
            problem = f"was to be killed at {self.places[line - 1]}"
        elif left == "ruins":
            problem = "what has the final name is neither the older checkpoint nor the complete new one"
        else:
            problem, converted = self._convert_again(left, finished)
        return Kill(
            self.case, self.overwrite, line, len(self.places), str(place), left, len(finished), len(converted), problem
        )

    def _convert_again(self, left: str, finished: set[str]) -> tuple[str, set[str]]:
        """Returns what was wrong, and what was converted."""
        if self.overwrite and left == "nothing":
            refused = run_apart(partial(self._convert, overwrite=False))
            if "exists already" not in refused["error"] or digest(self._root / "out") != self._older:
                return f"the older checkpoint did not come back: {refused['error']}", set()
        result = run_apart(self._convert)
        converted = set(result["converted"])
        if left == "new" and not self.overwrite:
            if "exists already" not in result["error"]:
                return f"the complete checkpoint was not in the way: {result['error']}", converted
        elif result["error"]:
            return f"the second conversion failed: {result['error']}", converted
        elif left != "new" and converted != self._tensors - finished:
            return f"finished {sorted(finished)} and then converted {sorted(converted)}", converted
        if digest(self._root / "out") != self._new:
            return "the second conversion gave other bytes", converted
        if (names := sorted(os.listdir(self._root))) != ["in", "out"]:
            return f"left behind: {names}", converted
        return "", converted

    def _reset(self) -> None:
        for path in self._root.iterdir():
            if path.name != "in":
                shutil.rmtree(path)
        if self.overwrite:
            shutil.copytree(self._backup, self._root / "out")

    def _read_journal(self) -> set[str]:
        """The source's tensors that a journal has whole lines for."""
        journal = self._root / ".out.partial/journal"
        lines = journal.read_text().split("\n")[1:-1] if journal.exists() else []
        return {json.loads(line)[0].replace("weight_by_neuron", "weight") for line in lines}


class _Names(Quiet):
    """Remembers what was converted, which is not what was checked and compared after."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._converts = False

    def begin(self, stage: str, total_bytes: int, done_bytes: int = 0) -> None:
        self._converts = stage in ("convert", "calibrate")

    def advance(self, tensor: str, done_bytes: int) -> None:
        if self._converts:
            self.names.append(tensor)


def convert(
    root: Path,
    options: dict[str, Any],
    sender: Connection,
    *,
    traced: bool = False,
    kill_at: int | None = None,
    rename_early: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """Converts `root/in` to `root/out`, in several shards and small slices; every tensor is noted when it is finished.

    Args:
        root: folder.
        options: of `run.convert`.
        sender: is sent the place, if this process is killed.
        traced: whether to follow lines.
        kill_at: number of the line at which this process is killed.
        rename_early: break the promise that only a complete folder gets the final name.
        changes: to `options`.
    """
    mx.set_default_device(mx.cpu)
    os.fsync = lambda descriptor: None  # it is against a loss of power, which no kill can stand in for, and slow
    quantize.SLICE_BYTES, work_folder.COMMIT_EVERY_S = 6_000, 0.0
    run.VERIFICATION_SAMPLES, run.SEQUENCE_LENGTH = 2, 16
    run.write_picture = lambda *_: None  # a second for each of some hundred conversions
    run.plan_shards = partial(files.plan_shards, shard_bytes=20_000)
    if rename_early:
        run._write_weights = partial(_write_after_renaming, run._write_weights, root / "out")
    reporter, places, error = _Names(), list[str](), ""
    if traced or kill_at:
        sys.settrace(_follow_lines(places, kill_at, sender))
    try:
        run.convert(root / "in", root / "out", **options | changes, reporter=reporter)
    except ArceeError as refusal:
        error = str(refusal)
    sys.settrace(None)
    return {"error": error, "converted": reporter.names, "places": places}


def _write_after_renaming(write: Callable[..., Any], target: Path, work: Any, *args: Any, **options: Any) -> Any:
    work.publish()
    work.model, work.publish = target, lambda: None
    return write(work, *args, **options)


def _follow_lines(places: list[str], kill_at: int | None, sender: Connection) -> Callable[..., Any]:
    """A trace function; see sys.settrace. It notes where each line is, and kills the process at one of them."""

    def follow(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            code = frame.f_code
            places.append(f"{os.path.basename(code.co_filename)}:{frame.f_lineno} {code.co_name}")
            if len(places) == kill_at:
                sender.send(places[-1])
                os.kill(os.getpid(), signal.SIGKILL)
        return follow

    return lambda frame, event, _: follow if frame.f_code.co_filename.startswith(_TRACED) else None


def run_apart(function: Callable[..., Any]) -> Any:
    """Calls a function with a keyword `sender` in a process of its own; returns what it sent, or else its result."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_send_result, args=(function, sender))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    return result


def _send_result(function: Callable[..., Any], sender: Connection) -> None:
    sender.send(function(sender=sender))


def digest(folder: Path) -> dict[str, str] | None:
    """SHA-256 of weights, index and configs by name; other files, which may hold times, by name only."""
    if not folder.exists():
        return None
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix in (".safetensors", ".json") and path.name != "conversion.json"
        else ""
        for path in folder.iterdir()
    }


def choose_lines(drills: list[Drill], count: int) -> Iterator[tuple[Drill, int]]:
    """Lines at which to kill: drawn over all that are executed, and all of the functions that name and remove folders."""
    choose = random.Random(count)
    for i in range(count):
        drill = drills[i % len(drills)]
        yield drill, choose.randint(1, len(drill.places))
    for drill in drills[:2]:
        for line, place in enumerate(drill.places, start=1):
            if place.endswith(_AROUND_RENAMES):
                yield drill, line


if __name__ == "__main__":
    folder, count, rename_early = Path(sys.argv[1]), int(sys.argv[2]), "--rename-early" in sys.argv
    drills = [
        Drill(folder, case, overwrite=overwrite, rename_early=rename_early)
        for case in CASES
        for overwrite in (False, True)
    ]
    for drill, line in choose_lines(drills, count):
        print(json.dumps(asdict(drill.kill(line))), flush=True)
