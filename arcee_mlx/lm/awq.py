"""AWQ for Arcee in mlx-lm: its search, on layers in its calling convention, with the right scale for up -> down.

AWQ multiplies the columns of a layer that reads large inputs and divides what feeds it by the same numbers, so that
rounding hurts less and nothing else changes. Between up_proj and down_proj stands the activation: relu(x)² turns a
factor on x into its square, so a scale of down_proj's columns enters up_proj's rows as its square root. mlx-lm's rule
for Llama, whose up_proj meets no activation, divides by the scale itself and would change the model.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from .. import upstream
from ..errors import InputError
from ..model.activations import ACTIVATIONS
from ..model.config import ArceeConfig
from ..model.decoder import MLP, ArceeForCausalLM, Attention, DecoderLayer
from ..model.masks import Mask
from ..model.rope import RotaryEmbedding

# act(c x) == c**degree act(x) for c > 0. Under any other activation the pair has no exact scale and is left out.
_DEGREES = {ACTIVATIONS[name]: degree for name, degree in {"relu2": 2, "relu": 1, "leaky_relu": 1, "linear": 1}.items()}

AwqMask = mx.array | Literal["causal"] | None


def register() -> None:
    """Adds `arcee` to mlx-lm's AWQ, once. Other models' AWQ is untouched."""
    awq: Any = upstream.mlx_lm_module("quant.awq")
    if "arcee" in awq.AWQ_MODEL_CONFIGS:
        return
    awq.AWQ_MODEL_CONFIGS["arcee"] = awq.AWQConfig(
        embed="embed_tokens",
        lm_head="lm_head",
        no_clip=["q_proj", "k_proj"],
        scale_configs=[
            awq.ScaleConfig(
                block="self_attn",
                prev="input_layernorm",
                layers=["attention.q_proj", "attention.k_proj", "attention.v_proj"],
                kwargs=["mask"],
            ),
            awq.ScaleConfig(
                prev="mlp", layers=["mlp.down_proj"], use_config=lambda block: block.mlp.act_fn in _DEGREES
            ),
            awq.ScaleConfig(block="mlp", prev="post_attention_layernorm", layers=["up_proj"]),
        ],
    )
    quantize, apply = awq.awq_quantize, awq.apply_scale

    @wraps(quantize)
    def awq_quantize(model: Any, *args: Any, **options: Any) -> None:
        if not isinstance(model, ArceeForCausalLM):
            return quantize(model, *args, **options)
        refuse_by_neuron("awq", model.config)
        view = AwqModel(model)
        quantize(view, *args, **options)
        if "lm_head" in view:
            model.lm_head = view.lm_head

    @wraps(apply)
    def apply_scale(previous: nn.Module, layers: list[nn.Module], scales: mx.array) -> None:
        if isinstance(previous, MLP):
            scale_neurons(previous, scales)
        else:
            apply(previous, layers, scales)

    awq.awq_quantize, awq.apply_scale = awq_quantize, apply_scale


def refuse_by_neuron(tool: str, config: ArceeConfig) -> None:
    """Stops a tool of mlx-lm that knows nn.Linear alone, and would leave by-neuron layers out or spoil them.

    Raises:
        InputError: the model's down projections are stored by neuron.
    """
    if config.down_proj_layout == "by_neuron":
        raise InputError(
            f"{tool} on {config.source}, whose down projections are stored by neuron; expected the standard layout, which "
            f"is all that tool knows; convert the original anew: arcee-mlx convert --layout standard"
        )


def scale_neurons(mlp: MLP, scales: mx.array) -> None:
    """Multiplies down_proj's columns by `scales` (F,), all positive, and takes it back in up_proj: the same function."""
    up: nn.Linear = mlp.up_proj
    down: Any = mlp.down_proj  # an nn.Linear: layers by neuron were refused
    root = scales ** (1 / _DEGREES[mlp.act_fn])
    up.weight = up.weight / root[:, None]
    if "bias" in up:
        up.bias = up.bias / root
    down.weight = down.weight * scales
    if "input_feat" in down:  # what mlx-lm saw flow into the layer
        down.input_feat = down.input_feat / scales


class AwqModel(nn.Module):
    """A model as mlx-lm's AWQ walks through one. It shares the model's modules: what changes there changes here."""

    def __init__(self, model: ArceeForCausalLM) -> None:
        super().__init__()
        self.model = model.model
        self.layers = [_Layer(layer, model.model.rotary_emb) for layer in model.layers]
        if "lm_head" in model:
            self.lm_head = model.lm_head


class _Layer(nn.Module):
    """A decoder layer that takes (x, mask) and gives x."""

    def __init__(self, layer: DecoderLayer, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.self_attn = _SelfAttention(layer.self_attn, rotary_emb)
        self.mlp = layer.mlp
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def __call__(self, x: mx.array, mask: AwqMask = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class _SelfAttention(nn.Module):
    """Attention over whole sequences that makes its rotation itself; the model makes one for all layers."""

    def __init__(self, attention: Attention, rotary_emb: RotaryEmbedding) -> None:
        super().__init__()
        self.attention = attention
        self.rotary_emb = rotary_emb

    def __call__(self, x: mx.array, mask: AwqMask = None) -> mx.array:
        length = x.shape[1]
        rotation = self.rotary_emb.rotation(mx.arange(length)[None], self.rotary_emb.table(length), x.dtype)
        return self.attention(x, rotation, Mask(mask), None)[0]
