"""Converts damaged checkpoints, several hundred of them, and says of each how it ended and what was wrong with that.

    python tests/conversion/damaged.py FOLDER [KIND ...]

Prints a JSON object a case. It is a program so that a crash or a hang ends it and not the tests: what is still running
after `LIMIT_S` is shown with its stack. The same cases every time; nothing of FOLDER is left but what was in it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a program, from any folder

import mlx.core as mx
import numpy as np
import safetensors

from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.result import peak_memory_bytes
from arcee_mlx.conversion.run import convert
from arcee_mlx.errors import ArceeError

from damaged_base import Case, Content, Link, Sparse
from damaged_folders import FOLDER_KINDS
from damaged_weights import WEIGHT_KINDS

KINDS: dict[str, Callable[[random.Random], Iterator[Case]]] = WEIGHT_KINDS | FOLDER_KINDS
LIMIT_S = 300
_FLOATS = {"F32": (np.uint32, mx.float32), "F16": (np.uint16, mx.float16), "BF16": (np.uint16, mx.bfloat16)}
_WIDTHS = _FLOATS | {"U32": (np.uint32, mx.uint32)}


@dataclass(frozen=True)
class Ending:
    """How a conversion ended.

    Attributes:
        error: the message of an ArceeError; "" if the checkpoint was converted.
        problem: what was wrong with that; "" for nothing.
        peak_bytes: the most memory the process had had by then.
    """

    kind: str
    case: str
    error: str
    problem: str
    peak_bytes: int


def make_cases(kind: str) -> Iterator[Case]:
    """The cases of a kind of damage."""
    return KINDS[kind](random.Random(kind))


def try_case(kind: str, case: Case, root: Path) -> Ending:
    """Writes a checkpoint into the new folder `root`, converts it and judges the ending."""
    write_files(root, case.files)
    before = describe_tree(root)
    recipe = Recipe(
        quantization=Quantization(bits=case.bits, group_size=32) if case.bits else None,
        dtype=case.dtype,
        layout="standard",
    )
    error = problem = ""
    try:
        convert(root / "in", root / "out", recipe, allow_nonfinite=case.allow_nonfinite)
    except ArceeError as refusal:
        error = str(refusal)
        problem = judge_refusal(case, error)
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}"
    else:
        if case.says and not case.may_convert:
            problem = f"was converted; expected an error that says {case.says}"
        else:
            problem = judge_result(case, root / "in", root / "out")
        shutil.rmtree(root / "out")
    if not problem and (after := describe_tree(root)) != before:
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        problem = f"left behind or changed: {changed}"
    shutil.rmtree(root)
    return Ending(kind, case.name, error, problem, peak_memory_bytes())


def write_files(root: Path, files: Mapping[str, Content]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "folder":
            path.mkdir()
        elif content == "pipe":
            os.mkfifo(path)
        elif isinstance(content, Link):
            path.symlink_to(content.target.replace("/ROOT", str(root), 1))
        else:
            path.write_bytes(content.head if isinstance(content, Sparse) else content)
            if isinstance(content, Sparse):
                os.truncate(path, content.size)


def describe_tree(root: Path) -> dict[str, object]:
    """Mode and content of all that is in a folder, links not followed; of a long file its size."""
    tree: dict[str, object] = {}
    for folder, folders, files in os.walk(root):
        for path in (Path(folder, name) for name in folders + files):
            status = path.lstat()
            content: object = os.readlink(path) if path.is_symlink() else None
            if content is None and path.is_file():
                content = path.read_bytes() if status.st_size < 10**7 else status.st_size
            tree[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns * path.is_file(), content)
    return tree


def judge_refusal(case: Case, error: str) -> str:
    if not case.says:
        return "was refused; expected a correct result"
    lacking = [text for text in case.says if text not in error]
    if lacking:
        return f"the error does not say {lacking}"
    return "" if "\n" not in error and len(error) < 2000 else "the error is no line that can be read"


def judge_result(case: Case, source: Path, target: Path) -> str:
    """Compares a converted folder with what the safetensors library and plain JSON make of the source."""
    try:
        expected = expect_tensors(case, read_tensors(source))
    except Exception as failure:
        return f"was converted, though safetensors says: {failure}"
    found = read_tensors(target)
    if found.keys() != expected.keys():
        return f"has other tensors: {sorted(found.keys() ^ expected.keys())}"
    for name, values in expected.items():
        if found[name].dtype != values.dtype or not mx.array_equal(found[name].view(mx.uint8), values.view(mx.uint8)):
            return f"has other values in {name}"
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    ours = {"torch_dtype", "dtype", "tie_word_embeddings", "quantization", "quantization_config"}
    if repr({key: after.get(key) for key in before.keys() - ours}) != repr(
        {key: before[key] for key in before.keys() - ours}
    ):
        return "has another config"
    for name in ("tokenizer.json", "LICENSE", "NOTICE", "merges.txt", "additional_chat_templates/rag.jinja"):
        if (source / name).exists() and (target / name).read_bytes() != (source / name).read_bytes():
            return f"has another {name}"
    odd = [str(path) for path in target.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    return f"has links: {odd}" if odd else ""


def read_tensors(folder: Path) -> dict[str, mx.array]:
    """A checkpoint as the safetensors library reads it."""
    if (folder / "model.safetensors").exists():
        files = ["model.safetensors"]
    else:
        files = sorted(set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values()))
    read: dict[str, mx.array] = {}
    for file in files:
        for name, info in safetensors.deserialize((folder / file).read_bytes()):
            if name.endswith("inv_freq"):
                continue
            storage, dtype = _WIDTHS[info["dtype"]]
            read[name] = mx.array(np.frombuffer(info["data"], storage).reshape(info["shape"])).view(dtype)
    return read


def expect_tensors(case: Case, tensors: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """What the conversion must hold: each tensor cast as a whole, and matrices quantized as a whole."""
    expected: dict[str, mx.array] = {}
    for name, values in tensors.items():
        values = expected[name] = values.astype(getattr(mx, case.dtype))
        if not case.bits or values.ndim != 2:
            continue
        codes, scales, biases = mx.quantize(values, group_size=32, bits=case.bits)
        finite = mx.isfinite(values).reshape(*scales.shape, 32).all(axis=-1)
        path = name.removesuffix("weight")
        expected |= {name: codes, f"{path}scales": mx.where(finite, scales, mx.nan).astype(scales.dtype)}
        expected |= {f"{path}biases": mx.where(finite, biases, mx.nan).astype(biases.dtype)}
    return expected


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    with contextlib.suppress(
        ValueError, OSError
    ):  # so that a size believed ends in an error, not in a machine at its end
        resource.setrlimit(resource.RLIMIT_AS, (2**33, resource.RLIM_INFINITY))
    folder = Path(sys.argv[1])
    for kind in sys.argv[2:] or KINDS:
        for number, case in enumerate(make_cases(kind)):
            print(json.dumps(asdict(try_case(kind, case, folder / f"{kind}{number}"))), flush=True)
