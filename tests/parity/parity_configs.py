"""Configs of every rope and shape, in the forms that transformers has written."""

from __future__ import annotations

from typing import Any


def rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **options}


FACTORS = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.7 * i for i in range(8)]}
LONG = 24  # sequences are this long: over the 16 original or maximal positions of the configs that depend on length
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "old_theta": {"rope_theta": 500.0},
    "linear_old": {"rope_scaling": {"type": "linear", "factor": 3.0}},
    "linear": {"rope_parameters": rope("linear", factor=2.5)},
    "dynamic": {"rope_parameters": rope("dynamic", factor=2.0), "max_position_embeddings": 16},
    "dynamic_old": {"rope_scaling": {"type": "dynamic", "factor": 4}, "max_position_embeddings": 16, "rope_theta": 300},
    "yarn": {"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=16)},
    "yarn_old": {"rope_scaling": {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 8,
                                  "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0}},
    "yarn_mscales": {"rope_parameters": rope("yarn", factor=8, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=0.3)},
    "yarn_null_factor": {"rope_parameters": rope("yarn", factor=None, original_max_position_embeddings=8, truncate=False)},
    "yarn_attention_factor": {"rope_parameters": rope("yarn", factor=2.0, attention_factor=0.6), "original_max_position_embeddings": 8},
    "longrope": {"rope_parameters": rope("longrope", **FACTORS), "original_max_position_embeddings": 16},
    "longrope_factor": {"rope_parameters": rope("longrope", factor=3.0, original_max_position_embeddings=16, **FACTORS)},
    "longrope_short": {"rope_parameters": rope("longrope", attention_factor=1.4, **FACTORS)},
    "llama3": {"rope_parameters": rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                       original_max_position_embeddings=32)},
    "llama3_old": {"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4},
                   "rope_theta": 500000.0},
    "proportional": {"rope_parameters": rope("proportional", partial_rotary_factor=0.5)},
    "partial_rounds_up": {"rope_parameters": rope("linear", factor=2.0, partial_rotary_factor=0.95)},
    "both_forms": {"rope_parameters": rope("linear", factor=2.0), "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": None},
    "wide_heads": {"head_dim": 32},
    "narrow_heads": {"head_dim": 4, "num_attention_heads": 6, "num_key_value_heads": 3},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "silu": {"hidden_act": "silu", "rms_norm_eps": 0.1},
    "gelu": {"hidden_act": "gelu", "num_hidden_layers": 1},
    "no_layers": {"num_hidden_layers": 0},
}  # fmt: skip
