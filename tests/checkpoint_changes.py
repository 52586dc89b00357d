"""Copies of a checkpoint with one thing changed, on disk or on the hub, and what an inspection says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from arcee_mlx import Inspection
from arcee_mlx.checkpoint import files

from loopback_hub import LoopbackHub

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def texts(inspection: Inspection, level: str) -> str:
    return "\n".join(f"{f.topic}: {f.text}" for f in inspection.findings if f.level == level)


def copy(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def change_json(path: Path, *removed: str, **changes: object) -> None:
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps(kept | changes))


def change_config(*removed: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", *removed, **changes)


def change_tensors(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = dict(mx.load(str(folder / "model.safetensors")))
        mx.eval(tensors)
        change(tensors)
        (folder / "model.safetensors").unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)

    return rewrite


def shard(folder: Path, shard_bytes: int = 300_000) -> None:
    """The weights in two files with an index, as large checkpoints have them."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    shards = files.plan_shards({name: value.nbytes for name, value in tensors.items()}, shard_bytes)
    assert tuple(shards) == SHARDS
    for name, names in shards.items():
        mx.save_safetensors(str(folder / name), {key: tensors[key] for key in names})
    files.write_index(folder, shards, sum(value.nbytes for value in tensors.values()))


def upload(hub: LoopbackHub, folder: Path, repo_id: str = "org/model") -> dict[str, bytes]:
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add(repo_id, contents)
    return contents


def drop(*names: str) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, value: mx.array) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors.update({name: value}))


def tied(**changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        change_config(tie_word_embeddings=True)(folder)
        head = mx.load(str(folder / "model.safetensors"))["model.embed_tokens.weight"]
        if changes.get("head") == "equal":
            put("lm_head.weight", head)(folder)
        if changes.get("lost"):
            drop(str(changes["lost"]))(folder)

    return make
