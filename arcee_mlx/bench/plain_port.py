"""Arcee as a plain port to mlx-lm would have it: mlx-lm's own Llama with an ungated MLP. What our speed is compared with.

Nothing of arcee_mlx computes in it, so mlx-lm's tools run on Arcee checkpoints as they run on any other model. Only
the process that is measured may `register` it: `arcee_mlx.lm` is what an application wants.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import upstream
from ..errors import InputError
from ..model.config import ArceeConfig

_MODULE = "mlx_lm.models.arcee"
_ROPES = ("default", "linear", "llama3", "yarn")


def register() -> None:
    """Makes the port known to mlx_lm in this process, for good."""
    sys.modules[_MODULE] = build_port()


def build_port() -> ModuleType:
    """The module that mlx_lm looks for: `Model` and `ModelArgs`."""
    llama: Any = upstream.mlx_lm_module("models.llama")

    class ModelArgs(llama.ModelArgs):
        @classmethod
        def from_dict(cls, values: Mapping[str, Any]) -> Any:
            """Raises InputError for what no plain port would run; ConfigError as `ArceeConfig.from_dict`."""
            return cls(**_llama_values(ArceeConfig.from_dict(values)))

    class Model(llama.Model):
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            for layer in self.layers:
                layer.mlp = _MLP(args)

    port: Any = ModuleType(_MODULE)
    port.Model, port.ModelArgs = Model, ModelArgs
    return port


class _MLP(nn.Module):
    def __init__(self, args: Any) -> None:
        super().__init__()
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=args.mlp_bias)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=args.mlp_bias)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.relu2(self.up_proj(x)))


def _llama_values(config: ArceeConfig) -> dict[str, Any]:
    """A config in the words of mlx-lm's Llama."""
    if config.hidden_act != "relu2":
        raise InputError(f"{config.source}: hidden_act is {config.hidden_act!r}; expected 'relu2' in the plain port")
    return {
        "model_type": "arcee",
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope["rope_theta"],
        "rope_scaling": _rope_scaling(config),
        "tie_word_embeddings": config.tie_word_embeddings,
    }


def _rope_scaling(config: ArceeConfig) -> dict[str, Any]:
    """The rope's options, if mlx-lm's Llama computes with them what transformers computes."""
    kind = config.rope["rope_type"]
    scaling = {key: value for key, value in config.rope.items() if key != "rope_theta" and value is not None}
    same = kind in _ROPES and not {"attention_factor", "partial_rotary_factor", "truncate"} & scaling.keys()
    if (
        kind == "yarn"
    ):  # transformers reads mscale and mscale_all_dim together or not at all, and can do without a factor
        mscale, of_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
        same = same and "factor" in scaling and bool(mscale and of_all or mscale in (None, 1) and not of_all)
    if not same:
        raise InputError(
            f"{config.source}: rope_parameters is {config.rope}; expected {' or '.join(_ROPES)} with the options that "
            f"mlx-lm's Llama has, too; the plain port would compute something else"
        )
    return scaling
