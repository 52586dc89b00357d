"""What training asks of every model class: weights to begin with, and gradient checkpointing.

Source: transformers 5.23 `modeling_utils.py` (`_init_weights`, `gradient_checkpointing_enable`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from .. import upstream
from ..errors import InputError
from .config import ArceeConfig

DEFAULT_STD = 0.02  # where initializer_range is 0


class Trainable(nn.Module):
    """Base of ArceeModel and the classes around it."""

    @classmethod
    def from_config(cls, config: ArceeConfig, *, seed: int = 0) -> Self:
        """Makes a new model with weights as transformers draws them: no trained one is read.

        Matrices are normal with mean 0 and deviation `initializer_range` (0.02 where that is 0), norms 1, biases 0,
        and so is the embedding of `pad_token_id`. Weights are float32, whatever the config's dtype, in training mode;
        `model.set_dtype` makes them another. MLX's global random state is neither read nor changed.

        Args:
            seed: of the weights, at least 0; the same one gives the same weights.

        Raises:
            InputError: the seed is no integer of at least 0.
            ConfigError: the config does not fit the class.
        """
        if type(seed) is not int or seed < 0:
            raise InputError(f"seed is {seed!r}; expected an integer of at least 0; choose one")
        with upstream.keep_random_state():  # MLX draws for every layer that it makes
            model = cls(config)  # type: ignore[call-arg]
        key, std = mx.random.key(seed), config.initializer_range or DEFAULT_STD

        def draw(path: str, array: mx.array) -> mx.array:
            nonlocal key
            if array.ndim < 2:
                return (mx.zeros if path.endswith("bias") else mx.ones)(array.shape)
            key, own = mx.random.split(key)
            weight = std * mx.random.normal(array.shape, key=own)
            if path.endswith("embed_tokens.weight") and config.pad_token_id is not None:
                weight[config.pad_token_id] = 0
            return weight

        model.update(tree_map_with_path(draw, model.parameters()))
        return model

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `gradient_checkpointing_enable` holds."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def gradient_checkpointing_enable(self) -> None:
        """From now on training keeps each layer's input only, and computes the layer again for its gradients.

        The same loss and gradients with less memory and about a third more computing. It holds in training mode and
        without a cache; elsewhere there is nothing to save. `examples/train_classifier.py` shows what it saves.
        """
        self._set_gradient_checkpointing(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps what the layers compute, as before."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = value


def draw_key() -> mx.array:
    """A key of its own from MLX's global random state, which mx.compile follows and nobody can set back."""
    return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)


def recompute(layer: nn.Module, compute: Callable[[mx.array], Any], x: mx.array) -> Any:
    """`compute(x)`, of whose arrays only `x` is kept for the backward pass, which computes it again.

    Args:
        layer: whose parameters `compute` uses. They and `x` get gradients; nothing else that it uses does.

    Raises:
        InputError: the layer draws dropout from the global random state, which would be another the second time.
    """
    if any(isinstance(module, nn.Dropout) and module.training and module._p_1 < 1 for module in layer.modules()):
        raise InputError(
            "an adapter with dropout under gradient checkpointing; expected dropout 0, since a layer computed again "
            "would drop others; make the adapter without, or call gradient_checkpointing_disable()"
        )

    def run(parameters: Any, x: mx.array) -> Any:
        kept = layer.trainable_parameters()
        layer.update(parameters)
        try:
            return compute(x)
        finally:
            layer.update(kept)

    return mx.checkpoint(run)(layer.trainable_parameters(), x)
