"""`--dequantize` of mlx-lm's fuse and convert, for down projections stored by neuron, too: they become nn.Linear again.

What is written then is a float checkpoint of the standard layout, which transformers and `arcee-mlx convert` read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import upstream
from ..model.relu2.down import ByNeuron


@contextlib.contextmanager
def standard_when_dequantized(command: str) -> Iterator[None]:
    """Lets mlx-lm's `fuse` or `convert` store down projections as usual, once it has dequantized a model."""
    module: Any = upstream.mlx_lm_module(command)
    dequantize, save = module.dequantize_model, module.save

    def dequantize_model(model: nn.Module) -> nn.Module:
        store_standard(model)
        return dequantize(model)

    def save_model(
        path: Any, source: Any, model: nn.Module, tokenizer: Any, config: dict[str, Any], donate_model: bool = True
    ) -> None:
        if not any(isinstance(module, ByNeuron) for module in model.modules()):
            config.pop("down_proj_layout", None)
        save(path, source, model, tokenizer, config, donate_model=donate_model)

    module.dequantize_model, module.save = dequantize_model, save_model
    try:
        yield
    finally:
        module.dequantize_model, module.save = dequantize, save


def store_standard(model: Any) -> None:
    """Turns down projections stored by neuron, packed or not, into float nn.Linear, the same function; in place."""
    for mlp in [layer.mlp for layer in model.layers if isinstance(layer.mlp.down_proj, ByNeuron)]:
        linear, old = nn.Linear(1, 1, bias=False), mlp.down_proj
        linear.weight = mx.contiguous(old.rows.unpack().T)
        if "bias" in old:
            linear.bias = old.bias
        mlp.down_proj = linear
