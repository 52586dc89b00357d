"""The down projection stored by neuron: all that a neuron writes is one row, and that of a zero neuron is not read.

`nn.Linear` stores a row for each output; here W is transposed, (F, E): neurons, hidden, and quantized in groups along a
row. The key is `weight_by_neuron`, so that a loader that expects `weight` stops instead of computing nonsense.

After squared ReLU most neurons are exactly zero for a token. `after_relu2` leaves their rows out for up to 8 tokens at
once: the same sum without its zero terms. NaN counts as active. The path depends on the device and the number of tokens
alone, so that nothing waits for a GPU.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import InputError
from ..activations import relu2
from ..linear import has_fast_blas
from . import kernels, self_check
from .kernels import MAX_TOKENS
from .lora import LoRADownByNeuron
from .rows import Rows

VARIABLE = "ARCEE_MLX_SPARSE"
Sparse = Literal["off", "on", "auto"]
# kernel: on a GPU. gathered: rows taken out of the matrix, on the CPU, whose zeros are seen without waiting.
# dense: all rows. unpacked: all rows, as floats, for a plain product, the fastest for many tokens on a GPU, and for
# several with a fast BLAS on the CPU.
Path = Literal["kernel", "gathered", "dense", "unpacked"]
UNPACK_TOKENS = 512
BLAS_UNPACK_TOKENS = 6  # on the CPU with a BLAS that is worth it
# On the CPU taking rows out costs time of its own: below so many weights, or with a larger share of neurons to take, all
# rows are sooner read where they lie (`arcee-mlx bench decode`).
GATHER_WEIGHTS = 2**20
GATHER_SHARE = 0.4


class ByNeuron(nn.Module):
    """What the float and the quantized layer share: x (..., F) -> x @ rows + bias, (..., E)."""

    _group: mx.distributed.Group | None = None

    @property
    def rows(self) -> Rows:
        """The matrix as it is stored."""
        raise NotImplementedError

    @property
    def weight(self) -> mx.array:
        """The matrix as it is stored, for mlx-lm's tools, which tell sizes by it. It is no parameter and cannot be set."""
        return self["weight_by_neuron"]

    def __call__(self, x: mx.array) -> mx.array:
        """The product with all rows."""
        return self._add(self._sum_shares(self.rows.multiply(x)), None)

    def after_relu2(self, x: mx.array, residual: mx.array | None = None, *, sparse: Sparse | None = None) -> mx.array:
        """relu2(x) @ rows + bias + residual.

        Args:
            x: (..., F), what the activation takes.
            residual: (..., E).
            sparse: "off": read all rows; "on": leave some out however small the layer, and an error where the device
                cannot; "auto": leave them out where that is done and pays. None takes the environment's ARCEE_MLX_SPARSE, else auto.

        Raises:
            InputError: sparse, or the variable, is something else, or "on" and the kernel cannot be used.
        """
        tokens, rows = x.reshape(-1, x.shape[-1]), self.rows
        shape = (*x.shape[:-1], rows.hidden)
        path = self._choose_path(tokens, rows, sparse)
        if path == "kernel" and self._group is None:
            extra = None if residual is None else residual.reshape(-1, rows.hidden)
            return kernels.multiply(tokens, rows, self.get("bias"), extra).reshape(shape)
        if path == "kernel":
            y = kernels.multiply(tokens, rows)
        else:
            a = relu2(tokens)
            active = _find_active(a) if path == "gathered" else None
            if active is not None:
                y = rows.multiply(a[:, active], active)
            else:
                y = a @ rows.unpack() if path == "unpacked" else rows.multiply(a)
        return self._add(self._sum_shares(y.reshape(shape)), residual)

    def choose_path(self, x: mx.array, sparse: Sparse | None = None) -> Path:
        """The path that `after_relu2` takes for x (M, F). While training, and where arrays are traced, it is a dense one."""
        return self._choose_path(x, self.rows, sparse)

    def _choose_path(self, x: mx.array, rows: Rows, sparse: Sparse | None) -> Path:
        asked = sparse or os.environ.get(VARIABLE) or "auto"
        if asked not in ("off", "on", "auto"):
            raise InputError(f"{VARIABLE} is {asked!r}; expected off, on or auto; leave it unset for auto")
        on_gpu = _on_gpu()
        if asked != "off" and not self.training and x.shape[0] <= MAX_TOKENS:
            if not on_gpu:
                large = x.shape[1] * rows.hidden >= GATHER_WEIGHTS
                if large or asked == "on":
                    return "gathered"
            else:
                reason = kernels.explain_unserved(x, rows, self.get("bias"))
                reason = reason or self_check.find_fault(x.dtype, rows.bits, rows.group_size, x.shape[0])
                if reason is None:
                    return "kernel"
                if asked == "on":
                    raise InputError(f"{VARIABLE} is 'on' for {reason}; expected a product it can do; set it to auto")
        if not on_gpu and (not has_fast_blas() or x.dtype != mx.float32):
            return "dense"
        return "unpacked" if rows.bits and x.shape[0] >= (UNPACK_TOKENS if on_gpu else BLAS_UNPACK_TOKENS) else "dense"

    def shard(self, group: mx.distributed.Group) -> None:
        """Keeps this process's share of the neurons; what the processes compute is then summed.

        Raises:
            InputError: the neurons cannot be shared out evenly.
        """
        neurons, processes, rank = self.weight_by_neuron.shape[0], group.size(), group.rank()
        if neurons % processes:
            raise InputError(f"{processes} processes for {neurons} neurons; expected a divisor of the neurons")
        share = slice(rank * neurons // processes, (rank + 1) * neurons // processes)
        for name in ("weight_by_neuron", "scales", "biases"):
            if name in self:
                self[name] = mx.contiguous(self[name][share])
        self._group = group

    def to_lora(self, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRADownByNeuron:
        """This layer with a low-rank update, as mlx-lm asks of a layer."""
        return LoRADownByNeuron(self, r, dropout, scale)

    def with_update(self, update: mx.array, *, dequantize: bool = False) -> ByNeuron:
        """A layer with `update` (F, E) added to its weights; a quantized one is rounded again unless `dequantize`."""
        raise NotImplementedError

    def _sum_shares(self, y: mx.array) -> mx.array:
        return mx.distributed.all_sum(y, group=self._group) if self._group else y

    def _add(self, y: mx.array, residual: mx.array | None) -> mx.array:
        y = y + self.bias if "bias" in self else y
        return y if residual is None else residual + y


class DownByNeuron(ByNeuron):
    """The layer in floats: weight_by_neuron (F, E)."""

    def __init__(self, neurons: int, hidden: int, bias: bool = False) -> None:
        """Args: F and E; initialised as nn.Linear is."""
        super().__init__()
        scale = neurons**-0.5
        self.weight_by_neuron = mx.random.uniform(-scale, scale, (neurons, hidden))
        if bias:
            self.bias = mx.random.uniform(-scale, scale, (hidden,))

    @classmethod
    def from_weight(cls, weight: mx.array, bias: mx.array | None = None) -> DownByNeuron:
        """A layer that holds these: (F, E) and (E,)."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight_by_neuron = weight
        if bias is not None:
            layer.bias = bias
        return layer

    @property
    def rows(self) -> Rows:
        return Rows(self["weight_by_neuron"])

    def with_update(self, update: mx.array, *, dequantize: bool = False) -> DownByNeuron:
        weight = self.weight_by_neuron + update.astype(self.weight_by_neuron.dtype)
        return DownByNeuron.from_weight(weight, self.get("bias")).train(self.training)  # type: ignore[return-value]

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedDownByNeuron:
        """Rounds each neuron's row in groups, as `nn.quantize` asks of a layer."""
        return QuantizedDownByNeuron(self, group_size, bits, mode)


class QuantizedDownByNeuron(ByNeuron):
    """The same with packed rows: weight_by_neuron uint32 (F, E * bits / 32), scales and biases (F, E / group_size)."""

    def __init__(self, layer: DownByNeuron, group_size: int | None, bits: int | None, mode: str) -> None:
        super().__init__()
        self.weight_by_neuron, self.scales, *biases = mx.quantize(layer.weight_by_neuron, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        if "bias" in layer:
            self.bias = layer.bias
        self.train(layer.training)
        hidden = layer.weight_by_neuron.shape[1]
        self.group_size = group_size or hidden // self.scales.shape[1]
        self.bits = bits or self.weight_by_neuron.shape[1] * 32 // hidden
        self.mode = mode
        self.freeze()

    @property
    def rows(self) -> Rows:
        return Rows(self["weight_by_neuron"], self["scales"], self.get("biases"), self.bits, self.group_size, self.mode)

    def unfreeze(self, *args: Any, **options: Any) -> nn.Module:
        """Leaves packed weights frozen, as nn.QuantizedLinear does: they cannot be trained."""
        super().unfreeze(*args, **options)
        return self.freeze(recurse=False)

    def with_update(self, update: mx.array, *, dequantize: bool = False) -> ByNeuron:
        updated = DownByNeuron.from_weight(self.rows.unpack(), self.get("bias")).with_update(update)
        updated.train(self.training)
        return updated if dequantize else updated.to_quantized(self.group_size, self.bits, self.mode)


def store_by_neuron(model: Any) -> None:
    """Turns a float model's down projections into `DownByNeuron`, a layer at a time: the weights are in memory once.

    Then a checkpoint of the standard layout, loaded as it is, leaves out the rows of zero neurons too.

    Args:
        model: ArceeModel, or one with a head; changed in place.

    Raises:
        InputError: a down projection is quantized, or has an adapter.
    """
    layers = [layer.mlp for layer in model.layers if not isinstance(layer.mlp.down_proj, ByNeuron)]
    for i, mlp in enumerate(layers):
        if type(mlp.down_proj) is not nn.Linear:
            raise InputError(
                f"down_proj {i} is {type(mlp.down_proj).__name__}; expected nn.Linear; load the float checkpoint without "
                f"an adapter, or convert it: arcee-mlx convert --layout by_neuron"
            )
    for mlp in layers:
        old = mlp.down_proj
        new = DownByNeuron.from_weight(mx.contiguous(old.weight.T), old.get("bias")).train(old.training)
        mx.eval(new.parameters())
        mlp.down_proj = new
        del old, new
    for owner in model.modules():
        if hasattr(owner, "config"):
            owner.config = dataclasses.replace(owner.config, down_proj_layout="by_neuron")


def _on_gpu() -> bool:
    return mx.default_device() == mx.gpu


def _find_active(a: mx.array) -> mx.array | None:
    """The neurons of a (M, F) that are not zero for all tokens, (n,).

    None where they are most, whose rows are sooner read where they lie; and where a is traced and has no values yet.
    """
    nonzero = mx.any(a != 0, axis=0)
    try:
        found = np.flatnonzero(np.asarray(nonzero))
    except ValueError:  # inside mx.compile, mx.vmap, mx.export_function
        return None
    if found.size > a.shape[1] * GATHER_SHARE:
        return None
    return mx.array(found if found.size else [0], mx.int32)  # MLX multiplies no empty matrices
