"""All that a training needs to go on to the same bits: trained weights, optimizer, random state, and how far it is.

One sealed file. It is tied to what the training was begun with: its settings, and the weights that are not trained.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import InputError
from .files import DTYPE_NAMES
from .sealed import new_sealed_file, read_sealed_file

_VERSION = 1
_KIND, _MAKER = "training state", "arcee_mlx.save_training_state"


def save_training_state(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: optim.Optimizer,
    *,
    settings: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Writes where a training stands, in place of an older file, whole or not at all.

    Args:
        path: of the .safetensors file.
        model: whose `trainable_parameters` are written.
        optimizer: whose state is written; MLX's global random state goes along.
        settings: all that decides what the training computes, and its data, in JSON values: a state is loaded with the
            same ones only.
        progress: what else the caller needs to go on, in JSON values.

    Raises:
        InputError: the file cannot be written.
        TypeError: settings or progress are no JSON values.
    """
    arrays = {name: _to_stored(array) for name, array in _flatten(model, optimizer).items()}
    random: Any = mx.random.state
    content = {
        "version": _VERSION,
        "settings": settings,
        "progress": progress,
        "random_state": random[0].tolist(),
        "frozen_sha256": _hash_frozen(model),
    }
    shapes = {name: (DTYPE_NAMES[array.dtype], tuple(array.shape)) for name, array in arrays.items()}
    with new_sealed_file(Path(path), _KIND, content, shapes) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def load_training_state(
    path: str | os.PathLike[str], model: nn.Module, optimizer: optim.Optimizer, *, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Puts a training back to where `save_training_state` found it, and gives the progress.

    Args:
        path: of the file.
        model: with the same parameters to train, and the same others; changed in place.
        optimizer: made as that one was; changed in place. MLX's global random state is set.
        settings: as saved.

    Raises:
        InputError: there is no such file, it is damaged, or of another training; nothing is changed then.
    """
    path = Path(path)
    content, entries = read_sealed_file(path, _KIND, _MAKER)
    if content.get("version") != _VERSION:
        raise InputError(
            f"{path}: is of format version {content.get('version')}; expected {_VERSION}; load it with the arcee_mlx that "
            f"saved it"
        )
    _check_settings(path, content["settings"], json.loads(json.dumps(settings)))
    optimizer.init(model.trainable_parameters())
    own = _flatten(model, optimizer)
    wanted = {name: (DTYPE_NAMES[(a := _to_stored(array)).dtype], tuple(a.shape)) for name, array in own.items()}
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    if differing := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise InputError(
            f"{path}: {differing[0]!r} is {found.get(differing[0])}; expected {wanted.get(differing[0])}; go on with the "
            f"model and the optimizer that it was saved with"
        )
    if content["frozen_sha256"] != _hash_frozen(model):
        raise InputError(
            f"{path}: was saved with other weights beside the trained ones; expected this model's; load the same base"
        )
    stored: Any = mx.load(str(path))
    arrays = {name: stored[name].view(array.dtype).reshape(array.shape) for name, array in own.items()}
    mx.eval(arrays)
    tree: Any = tree_unflatten(list(arrays.items()))
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    high, low = content["random_state"]
    mx.random.seed(high << 32 | low)
    return content["progress"]


def hash_weights(parameters: Any) -> str:
    """Of the names, shapes and first numbers of all arrays of a tree, in whichever dtype they are computed with."""
    weights: Mapping[str, mx.array] = dict(tree_flatten(parameters))
    first = {name: array.flatten()[:8].astype(mx.float32) for name, array in weights.items()}
    mx.eval(first)
    numbers = {name: (weights[name].shape, array.tolist()) for name, array in sorted(first.items())}
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def _flatten(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, mx.array]:
    return dict(tree_flatten({"model": model.trainable_parameters(), "optimizer": optimizer.state}))


def _hash_frozen(model: nn.Module) -> str:
    arrays: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    trained = dict(tree_flatten(model.trainable_parameters()))
    return hash_weights({name: arrays[name] for name in arrays.keys() - trained.keys()})


def _to_stored(array: mx.array) -> mx.array:
    """The array, or its bits where our files have no such dtype, as for the step's 64-bit integer."""
    return array if array.dtype in DTYPE_NAMES else array.reshape(-1).view(mx.uint32)


def _check_settings(path: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in sorted(saved.keys() | given.keys()):
        if saved.get(name) != given.get(name):
            raise InputError(
                f"{path}: {name} is {saved.get(name)!r}; expected {given.get(name)!r}, as given now; go on with what the "
                f"training was begun with, or begin anew"
            )
