"""The four programs that `bench decode` compares: one set of packed weights, both layouts of down projections, one port.

They share every array but the down projections, which are rounded from the same floats in both layouts; so all four are in
memory together, and what is changed in a bias of one is changed in all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import upstream
from ..checkpoint.files import DTYPES, TensorEntry
from ..checkpoint.loading import load_model
from ..checkpoint.quantization import Quantization
from ..errors import InputError
from ..measure.decode_bytes import DecodeBytes, count_decode_bytes
from ..model.config import ArceeConfig
from ..model.decoder import ArceeForCausalLM
from ..model.relu2.down import VARIABLE, ByNeuron, DownByNeuron, Sparse
from .plain_port import build_port

SPARSE, BY_NEURON, STANDARD, PORT = "sparse", "dense by neuron", "dense standard", "plain port"


@dataclass(frozen=True)
class Program:
    """One way to decode.

    Attributes:
        name: for tables.
        model: called as mlx-lm calls one.
        sparse: what ARCEE_MLX_SPARSE is while it runs.
    """

    name: str
    model: Any
    sparse: Sparse

    @contextmanager
    def running(self) -> Iterator[Any]:
        """The model, with the environment as the program wants it."""
        before = os.environ.get(VARIABLE)
        os.environ[VARIABLE] = self.sparse
        try:
            yield self.model
        finally:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before


@dataclass(frozen=True)
class Programs:
    """All four on the same weights.

    Attributes:
        config: with the table of the packed forms, whatever the layout.
        by_neuron, standard: the model with either layout of down projections.
        port: what mlx-lm would run.
        rounded_again: the layout whose down projections were unpacked from the other and rounded once more.
    """

    config: ArceeConfig
    by_neuron: ArceeForCausalLM
    standard: ArceeForCausalLM
    port: Any
    rounded_again: str | None = None

    def __iter__(self) -> Iterator[Program]:
        """Each of them, in the order in which they take turns."""
        yield Program(SPARSE, self.by_neuron, "auto")
        yield Program(BY_NEURON, self.by_neuron, "off")
        yield Program(STANDARD, self.standard, "off")
        yield Program(PORT, self.port, "off")

    @property
    def form(self) -> str:
        """Of the packed weights, in words."""
        table = self.config.quantization or {}
        return Quantization(**{key: table[key] for key in ("group_size", "bits", "mode") if key in table}).form

    def count_bytes(self, context_tokens: int, layers: int | None = None) -> DecodeBytes:
        """What a token reads, by neuron; with more layers, as many as are wanted of the kind of the first."""
        arrays: dict[str, mx.array] = dict(tree_flatten(self.by_neuron.parameters()))
        first = "model.layers.0."
        for index in range(len(self.by_neuron.layers), layers or 0):
            own = {
                key.replace(first, f"model.layers.{index}."): x for key, x in arrays.items() if key.startswith(first)
            }
            arrays |= own
        names = {dtype: name for name, (dtype, _) in reversed(DTYPES.items())}
        entries = {
            key: TensorEntry(key, names[x.dtype], tuple(x.shape), Path("-"), 0, x.nbytes) for key, x in arrays.items()
        }
        count = layers or self.config.num_hidden_layers
        return count_decode_bytes(replace(self.config, num_hidden_layers=count), entries, context_tokens=context_tokens)


def make_random(config: ArceeConfig, dtype: mx.Dtype, *, on_layer: Callable[[], object] | None = None) -> Programs:
    """Programs of a shape, with random weights in 4 bits; the same ones each time.

    Args:
        config: with mlp_bias, so that `set_zeros` has what it changes.
        dtype: of activations, scales and biases.
        on_layer: told of each layer that is made.
    """
    with upstream.keep_random_state():
        mx.random.seed(0)
        model = ArceeForCausalLM(config)  # random, and computed when it is packed
        model.set_dtype(dtype)
        return _make_programs(model, Quantization(), on_layer)


def read_programs(
    folder: Path, dtype: mx.Dtype | str | None, *, on_layer: Callable[[], object] | None = None
) -> Programs:
    """Programs of a checkpoint. A float one is rounded to 4 bits; a quantized one keeps its forms, in both layouts.

    Args:
        folder: of a causal model, in either layout.
        dtype: of activations, scales and biases; see `load_model`.
        on_layer: told of each layer that is read.

    Raises:
        ArceeError: the checkpoint cannot be used, or has no plain port.
    """
    model = load_model(folder, ArceeForCausalLM, dtype)
    with upstream.keep_random_state():
        return _make_programs(model, None if model.config.quantization else Quantization(), on_layer)


def _make_programs(
    model: ArceeForCausalLM, form: Quantization | None, on_layer: Callable[[], object] | None
) -> Programs:
    """Packs a model a layer at a time, in `form` unless it is packed already, and shares its layers out."""
    config, options = model.config, None if form is None else asdict(form)
    _check_config(config, form)
    rounded_again = (
        {"standard": "by neuron", "by_neuron": "standard"}[config.down_proj_layout] if form is None else None
    )
    if form is not None:
        config = replace(config, quantization=options)
    standard = ArceeForCausalLM(replace(config, down_proj_layout="standard"), tied="lm_head" not in model)
    by_neuron = ArceeForCausalLM(replace(config, down_proj_layout="by_neuron"), tied="lm_head" not in model)
    if options is not None:  # computed below, a layer at a time
        nn.quantize(model, **options, class_predicate=_is_matrix_but_down)
    mx.eval(model.model.embed_tokens.parameters())  # and the head at the end: one large matrix of floats at a time
    downs: list[tuple[Any, Any]] = []
    for layer in model.layers:
        downs.append(_store_both(layer.mlp.down_proj, options))
        layer.mlp.down_proj = downs[-1][0]
        mx.eval(layer.parameters(), downs[-1][1].parameters())
        if on_layer is not None:
            on_layer()
    mx.eval(model.parameters())
    ported = build_port()
    port = ported.Model(ported.ModelArgs.from_dict(replace(config, down_proj_layout="standard").to_dict()))
    for twin in (standard, by_neuron, port):
        twin.update_modules(model.leaf_modules())
        twin.eval()
    for layer, (_, down) in zip(by_neuron.layers, downs, strict=True):
        layer.mlp.down_proj = down.eval()
    return Programs(config, by_neuron, standard, port, rounded_again)


def _is_matrix_but_down(path: str, module: nn.Module) -> bool:
    return hasattr(module, "to_quantized") and not path.endswith("down_proj")


def _check_config(config: ArceeConfig, form: Quantization | None) -> None:
    if config.hidden_act != "relu2":
        raise InputError(f"{config.source}: hidden_act is {config.hidden_act!r}; expected 'relu2', which has the zeros")
    for name in ("hidden_size", "intermediate_size"):
        if form is not None and getattr(config, name) % form.group_size:
            raise InputError(
                f"{config.source}: {name} is {getattr(config, name)}; expected a multiple of {form.group_size}, so that "
                f"both layouts are packed in the same groups; name a quantized checkpoint, or another model"
            )


def _store_both(down: Any, options: dict[str, Any] | None) -> tuple[Any, ByNeuron]:
    """A down projection in the standard layout and by neuron, packed as `options` say, else as it is."""
    packed = hasattr(down, "bits")
    own: dict[str, Any] = {name: getattr(down, name) for name in ("group_size", "bits", "mode")} if packed else {}
    if isinstance(down, ByNeuron):
        matrix = down.rows.unpack()
    elif packed:
        matrix = mx.dequantize(down.weight, down.scales, down.get("biases"), **own).T
    else:
        matrix = down.weight.T
    rows: Any = DownByNeuron.from_weight(mx.contiguous(matrix), down.get("bias"))
    linear: Any = nn.Linear(1, 1, bias="bias" in down)
    linear.weight = mx.contiguous(matrix.T)
    if "bias" in down:
        linear.bias = down.bias
    if form := own or options:
        linear, rows = linear.to_quantized(**form), rows.to_quantized(**form)
    if not packed:
        return linear, rows
    return (linear, down) if isinstance(down, ByNeuron) else (down, rows)  # what is packed stays as it is
