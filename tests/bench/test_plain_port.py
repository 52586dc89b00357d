"""The plain port that stands for mlx-lm: it computes what arcee_mlx computes, through mlx-lm's own layers and caches."""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, ArceeForCausalLM, InputError
from arcee_mlx.bench import plain_port
from arcee_mlx.upstream import mlx_lm_module

from conftest import tiny_config

IDS = mx.array([[7, 3, 250, 399, 0, 12, 12, 88], [5, 1, 1, 2, 300, 41, 6, 9]])
AFM_ROPE = {
    "rope_type": "yarn", "type": "yarn", "factor": 20.0, "original_max_position_embeddings": 16, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0,
}  # fmt: skip


def build_both(**changes: Any) -> tuple[ArceeForCausalLM, Any]:
    """A random model and the port with the same weights."""
    model = ArceeForCausalLM(tiny_config(**changes))
    mx.random.seed(3)
    model.load_weights([(n, 0.4 * mx.random.normal(w.shape)) for n, w in tree_flatten(model.parameters())])
    port = plain_port.build_port()
    ported = port.Model(port.ModelArgs.from_dict(model.config.to_dict()))
    ported.load_weights(tree_flatten(model.parameters()), strict=True)
    return model, ported


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 300.0}},
        {"rope_parameters": AFM_ROPE},
    ],
    ids=["plain", "biases and a tied head", "linear", "AFM's yarn"],
)
def test_logits_are_those_of_arcee_mlx(changes: dict[str, Any]) -> None:
    model, ported = build_both(**changes)
    expected = model(IDS)
    assert mx.abs(ported(IDS) - expected).max().item() < 1e-4 * mx.abs(expected).max().item()


def test_cached_decode_equals_a_full_pass() -> None:
    model, ported = build_both()
    cache = mlx_lm_module("models.cache").make_prompt_cache(ported)
    steps = [ported(IDS[:, :5], cache=cache)] + [ported(IDS[:, i : i + 1], cache=cache) for i in range(5, 8)]
    expected = model(IDS)
    difference = mx.abs(mx.concatenate(steps, axis=1) - expected).max()
    assert difference.item() < 1e-4 * mx.abs(expected).max().item()


def test_the_mlp_has_no_gate_and_squares() -> None:
    _, ported = build_both()
    mlp = ported.layers[0].mlp
    assert set(mlp.children()) == {"up_proj", "down_proj"}
    assert isinstance(mlp.up_proj, nn.Linear)
    x = mx.random.normal((1, 3, 64), key=mx.random.key(1))
    assert mx.allclose(mlp(x), mx.maximum(x @ mlp.up_proj.weight.T, 0) ** 2 @ mlp.down_proj.weight.T).item()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_act": "silu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_parameters"),
        ({"rope_parameters": AFM_ROPE | {"attention_factor": 1.5}}, "rope_parameters"),
        ({"rope_parameters": AFM_ROPE | {"mscale": 0.7}}, "rope_parameters"),
        ({"rope_parameters": AFM_ROPE | {"factor": None}}, "rope_parameters"),
    ],
)
def test_what_llama_would_compute_otherwise_is_refused(changes: dict[str, Any], what: str) -> None:
    values = ArceeConfig.from_dict(tiny_config(**changes).to_dict()).to_dict()
    with pytest.raises(InputError, match=what):
        plain_port.build_port().ModelArgs.from_dict(values)


def test_building_it_tells_mlx_lm_nothing() -> None:
    before = sys.modules.get("mlx_lm.models.arcee")
    llama = mlx_lm_module("models.llama")
    mlp = llama.MLP
    build_both()
    assert sys.modules.get("mlx_lm.models.arcee") is before and llama.MLP is mlp
