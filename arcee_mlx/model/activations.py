"""The activations of transformers that this decoder can have; `relu2` is Arcee's own.

Source: transformers 5.23 `activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn


def relu2(x: mx.array) -> mx.array:
    """Squared ReLU, one kernel on a GPU. On the CPU backend fusing would first start a C++ compiler, for seconds."""
    return nn.relu2(x) if mx.default_device() == mx.gpu else mx.square(mx.maximum(x, 0))


_GELU_TANH = math.sqrt(2 / math.pi)
ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu": nn.gelu,
    "gelu_10": lambda x: mx.clip(nn.gelu(x), -10, 10),
    "gelu_accurate": nn.gelu_approx,
    "gelu_fast": lambda x: 0.5 * x * (1 + mx.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x))),
    "gelu_new": lambda x: 0.5 * x * (1 + mx.tanh(_GELU_TANH * (x + 0.044715 * x * x * x))),
    "gelu_python": nn.gelu,
    "gelu_python_tanh": nn.gelu_approx,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "leaky_relu": nn.leaky_relu,
    "linear": lambda x: x,
    "mish": nn.mish,
    "quick_gelu": lambda x: x * mx.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": relu2,
    "relu6": nn.relu6,
    "sigmoid": mx.sigmoid,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": mx.tanh,
}
