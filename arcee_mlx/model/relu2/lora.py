"""A low-rank update on a down projection stored by neuron: what mlx-lm's LoRALinear is to nn.Linear."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from ..activations import relu2


class LoRADownByNeuron(nn.Module):
    """linear(x) + scale * (x @ lora_a) @ lora_b: lora_a (F, r), lora_b (r, E), under mlx-lm's names."""

    def __init__(self, layer: nn.Module, r: int, dropout: float, scale: float) -> None:
        """Args: the layer, kept as it is; rank; dropout's probability, in training only; scale of the update."""
        super().__init__()
        neurons, hidden = layer.rows.weights.shape[0], layer.rows.hidden
        self.linear = layer
        self.dropout = nn.Dropout(p=dropout)
        self.scale = scale
        self.lora_a = mx.random.uniform(-(neurons**-0.5), neurons**-0.5, (neurons, r))
        self.lora_b = mx.zeros((r, hidden))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + self._update(x)

    def after_relu2(
        self, x: mx.array, residual: mx.array | None = None, *, sparse: Literal["off", "on", "auto"] | None = None
    ) -> mx.array:
        """See `ByNeuron.after_relu2`; the update is computed from all neurons."""
        return self.linear.after_relu2(x, residual, sparse=sparse) + self._update(relu2(x))

    def fuse(self, dequantize: bool = False) -> nn.Module:
        """The layer with the update in its weights; a quantized one is quantized again unless `dequantize`."""
        return self.linear.with_update((self.scale * self.lora_a) @ self.lora_b, dequantize=dequantize)

    def _update(self, a: mx.array) -> mx.array:
        return (self.scale * ((self.dropout(a) @ self.lora_a) @ self.lora_b)).astype(a.dtype)
