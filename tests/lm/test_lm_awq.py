"""AWQ's scales leave the model's output as it is before anything is rounded, and what is rounded then is the model."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from arcee_mlx.lm.awq import AwqModel, scale_neurons
from arcee_mlx.lm.model import Model
from arcee_mlx.upstream import mlx_lm_module

from conftest import flat, tiny_config

IDS = mx.array([[5, 6, 7, 300, 8, 9], [1, 2, 3, 4, 5, 6]])
awq = mlx_lm_module("quant.awq")
CONFIG = awq.AWQ_MODEL_CONFIGS["arcee"]


def random_model(**changes: object) -> Model:
    mx.random.seed(0)
    model = Model(tiny_config(**changes))
    model.load_weights([(name, 0.3 * mx.random.normal(value.shape)) for name, value in flat(model)])
    return model


def random_scales(count: int) -> mx.array:
    return mx.exp(mx.random.normal((count,)))


def apart(a: mx.array, b: mx.array) -> float:
    """The largest difference, relative to the largest value."""
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["relu2", "relu", "leaky_relu", "linear"])
def test_scaled_neurons_compute_the_same(activation: str, bias: bool) -> None:
    mlp = random_model(hidden_act=activation, mlp_bias=bias).layers[0].mlp
    x = mx.random.normal((2, 5, 64))
    before, weight = mlp(x), mlp.down_proj.weight
    scales = random_scales(128)
    scale_neurons(mlp, scales)
    assert apart(mlp(x), before) < 1e-4
    assert mx.array_equal(mlp.down_proj.weight, weight * scales).item()


def test_the_rule_for_llama_would_change_the_model() -> None:
    mlp = random_model().layers[0].mlp
    x = mx.random.normal((2, 5, 64))
    before = mlp(x)
    awq.apply_scale(mlp.up_proj, [mlp.down_proj], random_scales(128))
    assert apart(mlp(x), before) > 0.1


@pytest.mark.parametrize("activation", ["relu2", "silu"])
def test_every_pair_of_the_registered_config_leaves_the_output_unchanged(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(hidden_act=activation, attention_bias=True, mlp_bias=True)
    scaled: list[int] = []

    def draw_scales(layers: list[nn.Module], **_: object) -> mx.array:
        scaled.append(layers[0].weight.shape[1])
        return random_scales(layers[0].weight.shape[1])

    monkeypatch.setattr(awq, "search_best_scale", draw_scales)
    before = model(IDS)
    weights = dict(flat(model))
    for layer in AwqModel(model).layers:
        awq.scale_block(layer, CONFIG.scale_configs, lambda weight: weight, {"mask": "causal"}, n_grid=2)
    changed = {name.split(".", 3)[3] for name, value in flat(model) if not mx.array_equal(value, weights[name]).item()}
    assert apart(model(IDS), before) < 1e-4
    assert scaled == ([64, 128, 64] if activation == "relu2" else [64, 64]) * 2
    assert {"input_layernorm.weight", "self_attn.v_proj.weight", "mlp.up_proj.weight"} <= changed
    assert ("mlp.down_proj.weight" in changed) == (activation == "relu2")


def test_its_layers_are_the_models_layers() -> None:
    model = random_model(rope_parameters={"rope_type": "yarn", "factor": 4.0})
    view = AwqModel(model)
    x = view.model.embed_tokens(IDS)
    for layer in view.layers:
        x = layer(x, mask="causal")
    assert mx.array_equal(model.logits(model.model.norm(x)), model(IDS)).item()


@pytest.mark.parametrize("tied", [False, True])
def test_awq_rounds_the_model_it_is_given(tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(tie_word_embeddings=tied)
    before = model(IDS)
    awq.awq_quantize(model, IDS, CONFIG, group_size=32, bits=8, embed_group_size=32, embed_bits=8, n_grid=3)
    quantized = {path for path, module in model.named_modules() if hasattr(module, "bits")}
    assert len(quantized) == 2 * 6 + (1 if tied else 2) and "model.embed_tokens" in quantized
    assert 0 < apart(model(IDS), before) < 0.05


def test_other_models_keep_their_awq() -> None:
    previous = nn.Linear(4, 8, bias=False)
    following = nn.Linear(8, 4, bias=False)
    up, down, scales = previous.weight, following.weight, random_scales(8)
    awq.apply_scale(previous, [following], scales)
    assert mx.allclose(previous.weight, up / scales[:, None]).item()
    assert mx.allclose(following.weight, down * scales).item()
