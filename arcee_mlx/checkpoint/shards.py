"""Which safetensors belong to a checkpoint: one file, or those that an index names; by names alone, no tensor is looked at."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from ..errors import CheckpointError
from ..model.config import read_json

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


def read_weight_map(folder: Path) -> dict[str, str]:
    """Reads the index of a sharded checkpoint: tensor name -> file name.

    Raises:
        CheckpointError: the index is damaged, or names what is no safetensors file beside it.
    """
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{path}: has no usable weight_map; expected names of tensors and files")
    for name in dict.fromkeys(weight_map.values()):
        # The links of a hub cache point elsewhere and are fine: it is the name that must stay inside the folder.
        if not re.fullmatch(r"[\w.+-]+\.safetensors", name, re.ASCII):
            raise CheckpointError(
                f"{path}: names the file {name!r}; expected a .safetensors file in the same folder; "
                f"do not use this checkpoint"
            )
    return weight_map


def find_disagreements(
    folder: Path, weight_map: Mapping[str, str], tensors: Mapping[str, Collection[str]]
) -> Iterator[str]:
    """What an index says otherwise than the files, in words.

    Args:
        folder: of the checkpoint.
        weight_map: from the index.
        tensors: names of tensors by file; a file that is not there is passed over.
    """
    for tensor, name in weight_map.items():
        if name in tensors and tensor not in tensors[name]:
            yield f"{folder / name}: has no tensor {tensor!r}, which {INDEX_FILE} says it has; download it again"
    for name, names in tensors.items():
        if extra := sorted(tensor for tensor in names if weight_map.get(tensor) != name):
            yield f"{folder / name}: holds {extra[0]!r}, which {INDEX_FILE} does not list; download both again"


def explain_no_weights(folder: Path, names: Collection[str]) -> str:
    """The error for a checkpoint that has neither weights nor an index, by the names of its files."""
    if other := sorted(name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".gguf", ".npz")):
        return (
            f"{folder}: holds {other[0]} but no {WEIGHTS_FILE}; only safetensors are read; save the model with "
            f"transformers' save_pretrained first"
        )
    return f"{folder}: has no {WEIGHTS_FILE} and no {INDEX_FILE}; expected a Hugging Face or MLX checkpoint"
