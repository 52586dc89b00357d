"""What an adapter folder holds, whoever wrote it: its config's values checked, its tensors checked against a plan and read.

Paths of modules are those of the model, of a decoder without head those of ArceeForCausalLM.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError, ConfigError
from ..model.relu2.down import ByNeuron
from .files import FLOATS, TensorEntry, read_header

CONFIG_FILE = "adapter_config.json"
BY_NEURON = "weight_by_neuron"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding)
EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
ADAPTABLE = (nn.Linear, nn.QuantizedLinear, ByNeuron, *EMBEDDINGS)


@dataclass(frozen=True)
class LowRank:
    """One layer's update, in mlx-lm's terms: y = W x + scale * (x @ a) @ b; with a magnitude, DoRA's.

    Attributes:
        a: (in, r); of an embedding (V, r).
        b: (r, out); of an embedding (r, E).
        magnitude: length of each row of the sum, (out,), of an embedding (V,); None for LoRA.
        dropout: probability, in training only.
    """

    a: mx.array
    b: mx.array
    magnitude: mx.array | None
    scale: float
    dropout: float = 0.0


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to a model, by module path.

    Attributes:
        low_rank: the layers that get an update.
        weights: parameters, by name, that stand in for the base's: PEFT's `modules_to_save`, or a full fine-tune.
    """

    low_rank: Mapping[str, LowRank]
    weights: Mapping[str, Mapping[str, mx.array]]


@dataclass(frozen=True)
class Slot:
    """Where a tensor of the file goes: `part` of the module at `path`. `shape` is the file's."""

    path: str
    part: str
    shape: tuple[int, ...]
    transposed: bool = False
    optional: bool = False


@dataclass(frozen=True)
class Plan:
    """What adapter_config.json says that `file` holds for a model.

    Attributes:
        slots: by the tensors' names in the file. An updated module's parts are "lora_a", "lora_b", and "m" for DoRA.
        scales: of each updated module.
    """

    file: Path
    slots: Mapping[str, Slot]
    scales: Mapping[str, float]
    dropout: float = 0.0


def read_planned(plan: Plan) -> Adapter:
    """Reads what is planned, and all of it.

    Raises:
        ConfigError: nothing is planned.
        CheckpointError: the file is missing or damaged, or a tensor is missing, unexpected or mis-shaped.
    """
    if all(slot.optional for slot in plan.slots.values()):
        raise ConfigError(
            f"{plan.file.parent / CONFIG_FILE}: targets no layer of this model; expected an adapter made for it"
        )
    if not plan.file.exists():
        raise CheckpointError(_explain_no_file(plan.file))
    _check_tensors(plan, read_header(plan.file))
    arrays: Any = mx.load(str(plan.file), format="safetensors")
    # Read now: a training run may write over the file later.
    mx.eval([arrays[key] for key in plan.slots if key in arrays])
    parts: dict[str, dict[str, mx.array]] = {}
    for key, slot in plan.slots.items():
        if key in arrays:
            parts.setdefault(slot.path, {})[slot.part] = arrays[key].T if slot.transposed else arrays[key]
    low_rank = {
        path: LowRank(own.pop("lora_a"), own.pop("lora_b"), own.pop("m", None), plan.scales[path], plan.dropout)
        for path, own in parts.items()
        if path in plan.scales
    }
    return Adapter(low_rank, {path: own for path, own in parts.items() if own})


def dimensions(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, float or quantized; rows and columns of an embedding."""
    if isinstance(module, ByNeuron):
        return module.rows.weights.shape[0], module.rows.hidden
    rows, columns = module.weight.shape
    if isinstance(module, QUANTIZED):
        columns = columns * 32 // module.bits
    return (rows, columns) if isinstance(module, EMBEDDINGS) else (columns, rows)


def float_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's parameters, as if it were not quantized."""
    shapes = {name: tuple(array.shape) for name, array in module.parameters().items()}
    if not isinstance(module, (*QUANTIZED, ByNeuron)):
        return shapes
    inputs, outputs = dimensions(module)
    bias = {name: shape for name, shape in shapes.items() if name == "bias"}
    if isinstance(module, ByNeuron):
        return {BY_NEURON: (inputs, outputs)} | bias
    weight = (inputs, outputs) if isinstance(module, EMBEDDINGS) else (outputs, inputs)
    return {"weight": weight} | bias


def refuse_dora(path: str, module: nn.Module, source: Path) -> None:
    """Stops at DoRA on a layer that has no form of it: it needs the lengths of the columns of a matrix kept by rows.

    Raises:
        ConfigError: naming the layer and the config that asks for it.
    """
    if isinstance(module, ByNeuron):
        raise ConfigError(
            f"{source}: DoRA on {path!r}, which is stored by neuron; expected LoRA, or the standard layout; convert the "
            f"base anew: arcee-mlx convert --layout standard"
        )


@dataclass(frozen=True)
class AdapterConfig:
    """adapter_config.json, whose values are checked as they are taken; null counts as not given."""

    path: Path
    values: Mapping[str, Any]

    def take(self, key: str, default: Any, fits: Callable[[Any], bool], want: str) -> Any:
        """The value of a key.

        Raises:
            ConfigError: it, or the default, does not fit.
        """
        value = self.values.get(key)
        value = default if value is None else value
        if not fits(value):
            raise ConfigError(f"{self.path}: {key} is {value!r}; expected {want}; correct it in the config")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        return self.take(key, default, is_number, "a number")

    def probability(self, key: str) -> float:
        """A number from 0, the default, up to 1, which it is not."""
        return self.take(key, 0.0, lambda value: is_number(value) and 0 <= value < 1, "0 up to, but not with, 1")

    def rank(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        return self.take(key, default, is_rank, "a positive integer")

    def flag(self, key: str) -> bool:
        """True or false, which is the default."""
        return self.take(key, False, lambda value: isinstance(value, bool), "true or false")

    def names(self, key: str) -> list[str]:
        """A list of names, empty by default."""
        return self.take(
            key, [], lambda value: isinstance(value, list) and all(map(is_pattern, value)), "a list of names"
        )


def is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_rank(value: Any) -> bool:
    return is_int(value) and value > 0


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_pattern(value: Any) -> bool:
    """Whether a value is text that can be a regular expression; every module's name can."""
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _check_tensors(plan: Plan, entries: Mapping[str, TensorEntry]) -> None:
    missing = sorted(key for key, slot in plan.slots.items() if key not in entries and not slot.optional)
    unexpected = sorted(entries.keys() - plan.slots.keys())
    if missing:
        raise CheckpointError(
            f"{plan.file}: has no tensor {missing[0]!r}{_and_more(missing)}; expected shape "
            f"{plan.slots[missing[0]].shape} by {CONFIG_FILE}; check that the adapter is whole and made for this model"
        )
    if unexpected:
        raise CheckpointError(
            f"{plan.file}: holds {unexpected[0]!r}{_and_more(unexpected)} of shape {entries[unexpected[0]].shape}; "
            f"expected only what {CONFIG_FILE} names of this model; check that the adapter was made for it"
        )
    for key, entry in entries.items():
        if entry.shape != plan.slots[key].shape:
            raise CheckpointError(
                f"{plan.file}: {key!r} has shape {entry.shape}; expected {plan.slots[key].shape}; check that the "
                f"adapter was made for this model"
            )
        if entry.dtype not in FLOATS:
            raise CheckpointError(f"{plan.file}: {key!r} has dtype {entry.dtype}; expected one of {', '.join(FLOATS)}")


def _explain_no_file(file: Path) -> str:
    other = sorted(path.name for path in file.parent.iterdir() if path.suffix in (".bin", ".npz", ".pt", ".pth"))
    holds = f"holds {other[0]} but no {file.name}" if other else f"has no {file.name}"
    return f"{file.parent}: {holds}; expected safetensors, which alone are read; save the adapter as such"


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
