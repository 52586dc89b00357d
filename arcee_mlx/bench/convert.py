"""bench convert: our conversion beside mlx-lm's, at the same bits, in alternating processes of their own.

By default checkpoints of AFM-4.5B's shape with random weights are converted: seconds, peak memory and how that grows
with the layers, and whether both wrote the same weights. With --model and --text: how close each stays to the original
(convert_quality.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import open_checkpoint, same_content
from ..checkpoint.quantization import Quantization
from ..errors import ConversionError, InputError
from ..model.config import LAYOUTS
from .afm_shape import AFM_CONFIG, count_weights, write_checkpoint
from .convert_process import CONVERTERS, Converter, Effort, convert_in_process
from .convert_quality import compare_conversions
from .machine import describe_machine

_LAYERS = (9, 18, 36)
_RUNS = 2
_SPARE_BYTES = 2**28


@dataclass(frozen=True)
class Measurement:
    """What one converter took for one checkpoint, over all runs."""

    seconds: Sequence[float]
    peak_bytes: int
    output_bytes: int
    bits_per_weight: float


@dataclass(frozen=True)
class ShapeResult:
    """Both converters on one checkpoint.

    Attributes:
        layers: of the checkpoint.
        source_bytes: of its weights.
        page_cache_holds: whether the source stays in memory, so that no disk is measured.
        difference: the first tensor that is not in both outputs, equal to the bit; None if all are.
    """

    layers: int
    source_bytes: int
    page_cache_holds: bool
    ours: Measurement
    theirs: Measurement
    difference: str | None

    @property
    def time_ratio(self) -> float:
        """Seconds of ours / of theirs, medians."""
        return statistics.median(self.ours.seconds) / statistics.median(self.theirs.seconds)

    @property
    def memory_ratio(self) -> float:
        """Peak memory of ours / of theirs."""
        return self.ours.peak_bytes / self.theirs.peak_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `run` takes what they parse to."""
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help=f"decoder layers of the shapes ({_words(_LAYERS)})"
    )
    parser.add_argument("--runs", type=int, metavar="N", help=f"alternating runs of each program ({_RUNS})")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="where to write, and delete after; a folder on disk"
    )
    parser.add_argument("--model", metavar="PATH", help="measure quality: a float checkpoint, folder or hub id")
    parser.add_argument("--text", type=Path, metavar="FILE", help="with --model: a text that calibration never saw")
    parser.add_argument(
        "--calibrate", nargs="?", const=True, metavar="TEXT", help="with --model: convert as --calibrate does"
    )
    parser.add_argument("--recipe", metavar="NAME|FILE", help="with --model: convert by this recipe")
    parser.add_argument(
        "--layout", choices=LAYOUTS, help="with --model: of our down projections (default: standard, as mlx-lm's are)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")


def run(args: argparse.Namespace) -> int:
    """Measures speed and memory, or with --model the quality; prints the numbers and returns the exit status.

    Raises:
        InputError: options that do not go together, or are out of range.
        ArceeError: a conversion cannot be made.
    """
    if (args.model is None) != (args.text is None):
        raise InputError("one of --model and --text came alone; expected both, or neither to measure speed")
    work: Path = args.work or Path(tempfile.gettempdir())
    if not work.is_dir():
        raise InputError(f"--work is {work}, no folder; expected one that exists; make it first")
    if args.model is None:
        if any(option is not None for option in (args.calibrate, args.recipe, args.layout)):
            raise InputError(
                "--calibrate, --recipe or --layout came without --model; expected random weights in mlx-lm's default "
                "form; add --model"
            )
        values = measure_speed(args.layers or _LAYERS, runs=args.runs or _RUNS, work=work)
    else:
        if args.layers is not None or args.runs is not None:
            raise InputError("--layers or --runs came with --model; expected neither: a model's quality is no time")
        with work_folder(work) as folder:
            values = compare_conversions(
                args.model, args.text, folder, calibrate=args.calibrate, recipe=args.recipe, layout=args.layout
            )
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": describe_machine(), **values}, indent=2) + "\n", encoding="utf-8")
    return 0


def measure_speed(
    layers: Sequence[int], *, runs: int, work: Path, config: Mapping[str, Any] = AFM_CONFIG
) -> dict[str, Any]:
    """Lets both converters work on a checkpoint of each number of layers, and prints the result.

    Args:
        layers: numbers of decoder layers.
        runs: of each converter.
        work: folder in which a temporary one is made.
        config: of the checkpoints.

    Returns:
        the numbers, for JSON.

    Raises:
        InputError: a number of layers is below 1.
        ConversionError: too little disk space.
        ArceeError: a conversion failed.
    """
    if min(layers) < 1:
        raise InputError(f"--layers is {_words(layers)}; expected at least 1")
    _check_space(work, 2 * count_weights(max(layers), config))
    default = Quantization()
    print(f"mlx-lm {describe_machine()['mlx_lm']}; {default.bits} bits in groups of {default.group_size}; random bfloat16 "
          f"weights of AFM-4.5B's shape; runs of each: {runs}, alternating")  # fmt: skip
    results = []
    for count in sorted(set(layers)):
        with work_folder(work) as folder:
            results.append(measure_shape(folder, count, runs=runs, config=config))
        print("\n".join(describe_shape(results[-1])), flush=True)
    if len(results) > 1:
        print(describe_growth(results[0], results[-1]))
    return {"shapes": [asdict(r) | {"time_ratio": r.time_ratio, "memory_ratio": r.memory_ratio} for r in results]}


def measure_shape(folder: Path, layers: int, *, runs: int, config: Mapping[str, Any] = AFM_CONFIG) -> ShapeResult:
    """Writes a checkpoint into an empty folder and lets both converters work on it, alternating."""
    source = folder / "source"
    weights = count_weights(layers, config)
    print(f"{layers} layers: writing {2 * weights / 1e9:.2f} GB of random weights", file=sys.stderr)
    source_bytes = write_checkpoint(source, layers, config=config, progress=True)
    efforts: dict[Converter, list[Effort]] = {name: [] for name in CONVERTERS}
    for number in range(runs):
        for name in CONVERTERS:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()  # or a run would write out what the one before left in memory
            _read_files(source)
            efforts[name].append(convert_in_process(name, source, folder / name))
            last = efforts[name][-1]
            print(f"{layers} layers: {name} run {number + 1} of {runs}: {last.seconds:.1f} s, "
                  f"{last.peak_bytes / 1e9:.2f} GB", file=sys.stderr)  # fmt: skip
    measured = {}
    for name in CONVERTERS:
        output_bytes = sum(entry.nbytes for entry in open_checkpoint(folder / name).entries.values())
        measured[name] = Measurement(
            seconds=[effort.seconds for effort in efforts[name]],
            peak_bytes=max(effort.peak_bytes for effort in efforts[name]),
            output_bytes=output_bytes,
            bits_per_weight=8 * output_bytes / weights,
        )
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    used_bytes = source_bytes + measured["mlx_lm"].output_bytes + measured["mlx_lm"].peak_bytes
    return ShapeResult(
        layers=layers,
        source_bytes=source_bytes,
        page_cache_holds=used_bytes < memory_bytes,
        ours=measured["arcee_mlx"],
        theirs=measured["mlx_lm"],
        difference=find_difference(folder / "arcee_mlx", folder / "mlx_lm"),
    )


def find_difference(a: Path, b: Path) -> str | None:
    """The first tensor, by name, that two checkpoint folders do not both have, equal to the bit; None if there is none."""
    first, second = (open_checkpoint(folder).entries for folder in (a, b))
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second or not same_content(first[name], second[name]):
            return name
    return None


def describe_shape(result: ShapeResult) -> list[str]:
    """The lines that are printed for one number of layers."""
    cache = "warm" if result.page_cache_holds else "TOO SMALL, so the disk is measured, too"
    lines = [f"{result.layers} layers, {result.source_bytes / 1e9:.2f} GB; page cache {cache}"]
    for name, each in (("arcee_mlx", result.ours), ("mlx_lm", result.theirs)):
        lines.append(
            f"  {name:9s}  median {statistics.median(each.seconds):.2f} s, {min(each.seconds):.2f} to "
            f"{max(each.seconds):.2f} s; peak memory {each.peak_bytes / 1e9:.3f} GB; output "
            f"{each.output_bytes / 1e9:.3f} GB, {each.bits_per_weight:.3f} bits per weight"
        )
    same = "equal to the bit" if result.difference is None else f"DIFFERENT, first in {result.difference}"
    lines.append(
        f"  ratio      time {result.time_ratio:.3f}, memory {result.memory_ratio:.3f} (arcee_mlx / mlx_lm); weights {same}"
    )
    return lines


def describe_growth(small: ShapeResult, large: ShapeResult) -> str:
    """The line that says how memory grows with the layers."""
    parts = []
    for name, a, b in (("arcee_mlx", small.ours, large.ours), ("mlx_lm", small.theirs, large.theirs)):
        growth = b.peak_bytes / a.peak_bytes
        parts.append(f"{name} {a.peak_bytes / 1e9:.3f} to {b.peak_bytes / 1e9:.3f} GB (x {growth:.2f})")
    return f"growth       peak memory from {small.layers} to {large.layers} layers: {', '.join(parts)}"


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A new folder in `parent`, deleted with all that is in it when the block ends."""
    with tempfile.TemporaryDirectory(prefix="arcee-mlx-bench-", dir=parent) as folder:
        yield Path(folder)


def _check_space(work: Path, source_bytes: int) -> None:
    # Two outputs lie beside the source, each of 4.5 of its 16 bits or a little more.
    needed_bytes = round(1.6 * source_bytes) + _SPARE_BYTES
    free_bytes = shutil.disk_usage(work).free
    if free_bytes < needed_bytes:
        raise ConversionError(
            f"{work}: has {free_bytes / 1e9:.2f} GB free; expected {needed_bytes / 1e9:.2f} GB for the checkpoint and "
            f"both outputs; free some space, name a folder on another disk with --work, or fewer --layers"
        )


def _read_files(folder: Path) -> None:
    """Reads all files once, so that they lie in the page cache as far as it holds them."""
    buffer = bytearray(2**24)
    for path in folder.iterdir():
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _words(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))
