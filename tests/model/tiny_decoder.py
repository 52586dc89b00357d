"""A tiny random decoder with every kind of rope, and ids for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from arcee_mlx.model.config import ArceeConfig
from arcee_mlx.model.decoder import ArceeForCausalLM

V, L = 40, 20
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {"short_factor": [1.0, 1.2, 1.4, 1.6], "long_factor": [2.0, 3.0, 4.0, 5.0], "original_max_position_embeddings": 12},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8},
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip


def build(kind: str = "default", *, seed: int = 0, **changes: Any) -> ArceeForCausalLM:
    values: dict[str, Any] = {
        "vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 12,
        "rope_parameters": {"rope_type": kind, **ROPES[kind]},
    }  # fmt: skip
    mx.random.seed(seed)
    model = ArceeForCausalLM(ArceeConfig(**{**values, **changes}))
    for _, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = 1.3 * mx.random.normal(module.weight.shape) / module.weight.shape[1] ** 0.5
            if "bias" in module:
                module.bias = 0.3 * mx.random.normal(module.bias.shape)
        elif isinstance(module, nn.Embedding):
            module.weight = mx.random.normal(module.weight.shape)
        elif isinstance(module, nn.RMSNorm):
            module.weight = 1 + 0.2 * mx.random.normal(module.weight.shape)
    model.eval()
    mx.eval(model.parameters())
    return model


def ids(rows: int = 2, length: int = L, seed: int = 1) -> mx.array:
    return mx.random.randint(0, V, (rows, length), key=mx.random.key(seed))


def close(a: mx.array, b: mx.array, atol: float = 2e-5) -> bool:
    return a.shape == b.shape and mx.allclose(a, b, rtol=0, atol=atol).item()
