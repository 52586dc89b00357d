"""The plan that follows from a recipe: what becomes of each tensor, and config.json's table of it.

A plan knows the name, dtype and shape of all that will be written before a weight is read. So disk space is checked
first, each shard is laid out once and filled in place, and what was written can be compared with what was meant.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..checkpoint.files import DTYPES, TensorEntry
from ..checkpoint.names import strip_prefix
from ..checkpoint.quantization import Quantization, build_table
from .recipes import Recipe

_FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_DTYPE_WORDS = {file_dtype: word for word, file_dtype in _FILE_DTYPES.items()}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the source and what is written for it.

    Attributes:
        key: the model's, in the standard layout.
        source: where its values are.
        dtype: safetensors' name of the float dtype it is cast to, before it is quantized.
        quantization: None where it stays a float.
        outputs: name -> (safetensors dtype, shape), in the order in which they are computed and written.
        by_neuron: whether the matrix is transposed, before it is quantized.
        layer: path of the layer whose weight it is, if that layer has a quantized form.
        rule: index of the recipe's rule that decided; None where the default did.
    """

    key: str
    source: TensorEntry
    dtype: str
    quantization: Quantization | None
    outputs: Mapping[str, tuple[str, tuple[int, ...]]]
    by_neuron: bool = False
    layer: str | None = None
    rule: int | None = None

    @property
    def name(self) -> str:
        """The model's key of the first output, which the tensor is known by."""
        return next(iter(self.outputs))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix as it is stored, counted in weights."""
        return self.source.shape[::-1] if self.by_neuron else self.source.shape

    @property
    def form(self) -> str:
        """In words, such as "4 bits in groups of 64, by neuron" or "bfloat16"."""
        stored = self.quantization.form if self.quantization else _DTYPE_WORDS[self.dtype]
        return f"{stored}, by neuron" if self.by_neuron else stored

    @property
    def weights(self) -> int:
        """Number of weights; scales and biases of groups are not counted."""
        return math.prod(self.source.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(math.prod(shape) * DTYPES[dtype][0].size for dtype, shape in self.outputs.values())


def plan_tensors(
    sources: Mapping[str, TensorEntry],
    layers: Collection[str],
    recipe: Recipe,
    *,
    dtype: str,
    layout: str,
    num_layers: int,
) -> list[PlannedTensor]:
    """Decides what becomes of every tensor.

    Args:
        sources: the model's key -> the tensor in the source.
        layers: paths of the layers that have a quantized form. As in mlx-lm, one whose rows cannot be divided into
            whole groups stays a float.
        recipe: what to make of them.
        dtype: "float32", "float16" or "bfloat16", where the recipe leaves it open.
        layout: of down projections.
        num_layers: of the decoder, for rules that pick layers by number.

    Returns:
        the plan, in the order in which the tensors lie in the source's files.
    """
    target = _FILE_DTYPES[recipe.dtype or dtype]
    plan = []
    for key, source in sorted(sources.items(), key=lambda item: (item[1].file, item[1].start)):
        path, _, parameter = key.rpartition(".")
        if parameter != "weight" or path not in layers:
            plan.append(PlannedTensor(key, source, target, None, {key: (target, source.shape)}))
            continue
        rule, form = recipe.choose(_causal_path(path), num_layers)
        by_neuron = layout == "by_neuron" and path.endswith(".mlp.down_proj")
        rows, columns = source.shape[::-1] if by_neuron else source.shape
        if form is not None and columns % form.group_size:
            form = None
        packed = {"weight": (target, (rows, columns))} if form is None else form.pack(rows, columns, target)
        names = {"weight": "weight_by_neuron"} if by_neuron else {}
        outputs = {f"{path}.{names.get(parameter, parameter)}": spec for parameter, spec in packed.items()}
        plan.append(PlannedTensor(key, source, target, form, outputs, by_neuron, path, rule))
    return plan


def quantization_table(plan: Sequence[PlannedTensor]) -> dict[str, Any]:
    """config.json's `quantization`: a default, and by path each layer that differs or stays a float.

    Returns:
        the table; {} where all layers stay floats.
    """
    return build_table({tensor.layer: tensor.quantization for tensor in plan if tensor.layer is not None})


def describe_form(plan: Sequence[PlannedTensor]) -> str:
    """The forms of a plan in words, that with the most bytes first.

    Such as "4 bits in groups of 64, bfloat16, down projections by neuron".
    """
    nbytes: dict[str, int] = {}
    for tensor in plan:
        if (quantization := tensor.quantization) is not None:
            nbytes[quantization.form] = nbytes.get(quantization.form, 0) + tensor.nbytes
    forms = sorted(nbytes, key=lambda form: -nbytes[form])
    words = [" and ".join(forms)] if forms else []
    words.append(_DTYPE_WORDS[plan[0].dtype])
    if any(tensor.by_neuron for tensor in plan):
        words.append("down projections by neuron")
    return ", ".join(words)


def find_undivided(plan: Sequence[PlannedTensor], recipe: Recipe) -> list[str]:
    """Paths of the layers that stay floats only because their rows cannot be divided into whole groups."""
    layers = []
    for tensor in plan:
        asked = recipe.quantization if tensor.rule is None else recipe.rules[tensor.rule].quantization
        if tensor.layer is not None and tensor.quantization is None and asked is not None:
            layers.append(tensor.layer)
    return sorted(layers)


def find_idle_rules(plan: Sequence[PlannedTensor], recipe: Recipe) -> list[str]:
    """Names what a recipe says in vain, in words: rules that decide no layer, and globs that no layer's path matches."""
    paths = [_causal_path(tensor.layer) for tensor in plan if tensor.layer is not None]
    decided = {tensor.rule for tensor in plan}
    notes = []
    for index, rule in enumerate(recipe.rules):
        if unknown := [glob for glob in rule.tensors if not any(fnmatchcase(path, glob) for path in paths)]:
            notes.append(f"rules[{index}]: {', '.join(map(repr, unknown))} matches no layer of this model")
        elif index not in decided:
            notes.append(
                f"rules[{index}] decides no layer of this model: not one of its layers, or a rule before it does"
            )
    return notes


def _causal_path(path: str) -> str:
    """The path that a layer has in a causal model, for which rules are written."""
    bare = strip_prefix(path)
    return f"model.{bare}" if bare.split(".")[0] in ("layers", "embed_tokens") else path
