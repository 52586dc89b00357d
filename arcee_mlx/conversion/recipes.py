"""Recipe: what a conversion makes of a checkpoint; and the plan that follows from it, tensor by tensor.

A plan knows the name, dtype and shape of all that will be written before a weight is read. So disk space is checked
first, each shard is laid out once and filled in place, and what was written can be compared with what was meant.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..checkpoint.files import DTYPES, TensorEntry
from ..errors import InputError
from ..model.config import DTYPES as DTYPE_WORDS

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128)
MODES = ("affine",)
_FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How a weight matrix is stored: `bits` a weight, one scale and one bias for each `group_size` of a row."""

    group_size: int = 64
    bits: int = 4
    mode: str = "affine"

    def __post_init__(self) -> None:
        for name, allowed in (("group_size", GROUP_SIZES), ("bits", BITS), ("mode", MODES)):
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} is {value!r}; expected {' or '.join(map(str, allowed))}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make of a checkpoint.

    Attributes:
        quantization: of every linear layer, the embedding and the head; None keeps them floats.
        dtype: of all that stays a float, scales and biases of quantized weights included: "float32", "float16" or
            "bfloat16"; None for the checkpoint's own.
    """

    quantization: Quantization | None = Quantization()
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPE_WORDS:
            raise InputError(f"dtype is {self.dtype!r}; expected {' or '.join(DTYPE_WORDS)}")


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and what is written for it.

    Attributes:
        source: where its values are.
        dtype: safetensors' name of the float dtype it is cast to, before it is quantized.
        quantization: None where it stays a float.
        outputs: name -> (safetensors dtype, shape), in the order in which they are computed and written.
    """

    source: TensorEntry
    dtype: str
    quantization: Quantization | None
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(math.prod(shape) * DTYPES[dtype][0].size for dtype, shape in self.outputs.values())


def plan_tensors(
    sources: Mapping[str, TensorEntry], layers: Collection[str], recipe: Recipe, *, dtype: str
) -> list[PlannedTensor]:
    """Decides what becomes of every tensor.

    Args:
        sources: the model's key -> the tensor in the source.
        layers: paths of the layers that have a quantized form. As in mlx-lm, one whose rows cannot be divided into
            whole groups stays a float.
        recipe: what to make of them.
        dtype: "float32", "float16" or "bfloat16", where the recipe leaves it open.

    Returns:
        the plan, in the order in which the tensors lie in the source's files.
    """
    target = _FILE_DTYPES[recipe.dtype or dtype]
    plan = []
    for key, source in sorted(sources.items(), key=lambda item: (item[1].file, item[1].start)):
        path, _, parameter = key.rpartition(".")
        quantization = recipe.quantization if parameter == "weight" and path in layers else None
        if quantization is not None and source.shape[-1] % quantization.group_size:
            quantization = None
        if quantization is None:
            outputs = {key: (target, source.shape)}
        else:
            rows, columns = source.shape
            groups = (rows, columns // quantization.group_size)
            outputs = {
                key: ("U32", (rows, columns * quantization.bits // 32)),
                f"{path}.scales": (target, groups),
                f"{path}.biases": (target, groups),
            }
        plan.append(PlannedTensor(source, target, quantization, outputs))
    return plan
