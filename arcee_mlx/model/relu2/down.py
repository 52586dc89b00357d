"""The down projection stored by neuron: all that a neuron writes is one row, quantized in groups of its own.

`nn.Linear` stores a row for each output; here W is transposed, (F, E): neurons, hidden. A row whose neuron is zero need
not be read. The key is `weight_by_neuron`, so that a loader that expects `weight` stops instead of computing nonsense.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class DownByNeuron(nn.Module):
    """x (..., F) -> x @ weight_by_neuron + bias, (..., E)."""

    def __init__(self, neurons: int, hidden: int, bias: bool = False) -> None:
        """Args: F and E; initialised as nn.Linear is."""
        super().__init__()
        scale = neurons**-0.5
        self.weight_by_neuron = mx.random.uniform(-scale, scale, (neurons, hidden))
        if bias:
            self.bias = mx.random.uniform(-scale, scale, (hidden,))

    def __call__(self, x: mx.array) -> mx.array:
        x = x @ self.weight_by_neuron
        return x + self.bias if "bias" in self else x

    def to_quantized(
        self, group_size: int | None = None, bits: int | None = None, mode: str = "affine"
    ) -> QuantizedDownByNeuron:
        """Rounds each neuron's row in groups, as `nn.quantize` asks of a layer."""
        return QuantizedDownByNeuron(self, group_size, bits, mode)


class QuantizedDownByNeuron(nn.Module):
    """The same with packed rows: weight_by_neuron uint32 (F, E * bits / 32), scales and biases (F, E / group_size)."""

    def __init__(self, layer: DownByNeuron, group_size: int | None, bits: int | None, mode: str) -> None:
        super().__init__()
        self.weight_by_neuron, self.scales, *biases = mx.quantize(layer.weight_by_neuron, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        if "bias" in layer:
            self.bias = layer.bias
        hidden = layer.weight_by_neuron.shape[1]
        self.group_size = group_size or hidden // self.scales.shape[1]
        self.bits = bits or self.weight_by_neuron.shape[1] * 32 // hidden
        self.mode = mode
        self.freeze()

    def unfreeze(self, *args: Any, **options: Any) -> nn.Module:
        """Leaves packed weights frozen, as nn.QuantizedLinear does: they cannot be trained."""
        super().unfreeze(*args, **options)
        return self.freeze(recurse=False)

    def __call__(self, x: mx.array) -> mx.array:
        x = mx.quantized_matmul(
            x,
            self.weight_by_neuron,
            scales=self.scales,
            biases=self.get("biases"),
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )
        return x + self.bias if "bias" in self else x
