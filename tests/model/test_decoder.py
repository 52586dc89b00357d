"""The decoder's properties: caches, batches, gradients, heads, precision; exactness is the parity tests' matter."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, KVCache, QuantizedKVCache, RotatingKVCache

from arcee_mlx.errors import InputError
from arcee_mlx.model.activations import ACTIVATIONS
from arcee_mlx.model.config import ACTIVATIONS as ACTIVATION_NAMES
from arcee_mlx.model.decoder import ArceeForCausalLM, ArceeModel
from arcee_mlx.model.masks import Mask

from tiny_decoder import ROPES, L, build, close, ids

SHAPES: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one_kv_head": {"num_key_value_heads": 1},
    "all_kv_heads": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 32},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "silu": {"hidden_act": "silu"},
}
UNSCALED = [kind for kind in ROPES if kind not in ("dynamic", "longrope")]


@pytest.mark.parametrize("steps", [[1] * L, [L - 3, 1, 1, 1], [7, 6, 7]], ids=["tokens", "decode", "chunks"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_decode_equals_full_pass(shape: str, steps: list[int]) -> None:
    model, tokens = build(**SHAPES[shape]), ids()
    full = model(tokens)
    cache, start, parts = model.make_cache(), 0, []
    for step in steps:
        parts.append(model(tokens[:, start : start + step], cache))
        start += step
    assert close(mx.concatenate(parts, axis=1), full)
    assert cache[0].offset == L


@pytest.mark.parametrize("kind", UNSCALED)
def test_cached_decode_equals_full_pass_for_every_rope_that_does_not_grow(kind: str) -> None:
    model, tokens = build(kind), ids()
    cache = model.make_cache()
    parts = [model(tokens[:, :9], cache)] + [model(tokens[:, i : i + 1], cache) for i in range(9, L)]
    assert close(mx.concatenate(parts, axis=1), model(tokens))


@pytest.mark.parametrize("kind", ROPES)
def test_plain_call_is_forward(kind: str) -> None:
    model, tokens = build(kind), ids()
    assert close(model(tokens), build(kind).forward(tokens).logits, atol=0)
    a, b = model.make_cache(), model.make_cache()
    fresh = build(kind)
    for start, stop in ((0, 9), (9, 10), (10, 18), (18, 20)):
        assert close(model(tokens[:, start:stop], a), fresh.forward(tokens[:, start:stop], cache=b).logits, atol=0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_forward_of_a_long_sequence_leaves_nothing_in_plain_calls(kind: str) -> None:
    model, short = build(kind), ids(1, 5)
    before = model(short)
    model.forward(ids(1, 40))
    assert mx.array_equal(model(short), before)
    long = model(ids(1, 40))
    model.forward(short)
    assert mx.array_equal(model(ids(1, 40)), long)


@pytest.mark.parametrize("kind", ROPES)
def test_rows_of_a_batch_are_independent(kind: str) -> None:
    model, tokens = build(kind), ids(3)
    together = model(tokens)
    for row in range(3):
        assert close(model(tokens[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("kind", ROPES)
def test_left_padded_batch_equals_single_runs(kind: str) -> None:
    # Row 0 is twice as long: for dynamic and longrope it crosses the boundary at 12 tokens, the other does not.
    model, lengths = build(kind), [11, 4]
    rows = [ids(1, length, seed=length) for length in lengths]
    padded = mx.concatenate([mx.pad(row, [(0, 0), (11 - row.shape[1], 0)]) for row in rows])
    batch = [BatchKVCache([11 - length for length in lengths]) for _ in model.layers]
    alone = [model.make_cache() for _ in rows]
    got = model(padded, batch)
    for row, (tokens, cache) in enumerate(zip(rows, alone, strict=True)):
        assert close(got[row, 11 - lengths[row] :], model(tokens, cache)[0])
    for step in range(4):
        new = ids(2, 1, seed=100 + step)
        got = model(new, batch)
        for row, cache in enumerate(alone):
            assert close(got[row], model(new[row : row + 1], cache)[0])


def test_a_row_that_leaves_the_batch_changes_nothing() -> None:
    model = build("yarn")
    batch, single = [BatchKVCache([0, 3]) for _ in model.layers], model.make_cache()
    tokens = ids(2, 6)
    model(tokens, batch)
    model(tokens[1:, 3:], single)
    for cache in batch:
        cache.filter(mx.array([1]))
    new = ids(1, 1, seed=5)
    assert close(model(new, batch), model(new, single))


def test_rotating_cache_is_the_full_one_until_it_is_full() -> None:
    model, tokens = build(), ids(1, 12)
    rotating, full = model.make_cache(max_kv_size=12), model.make_cache()
    assert all(type(cache) is RotatingKVCache for cache in rotating)
    assert all(type(cache) is KVCache for cache in full)
    for start, stop in ((0, 8), (8, 9), (9, 12)):
        assert close(model(tokens[:, start:stop], rotating), model(tokens[:, start:stop], full))
    for step in range(30):
        logits = model(ids(1, 1, seed=step), rotating)
        assert mx.isfinite(logits).all()
    assert rotating[0].keys.shape[2] == 12 and rotating[0].offset == 42


def test_rotating_cache_sees_the_first_four_and_the_newest() -> None:
    model = build(num_hidden_layers=1)
    tokens = ids(1, 24)
    cache = model.make_cache(max_kv_size=8)
    for i in range(24):
        got = model(tokens[:, i : i + 1], cache)
    mask = mx.zeros((1, 24), mx.int32)
    mask[:, :4] = 1
    mask[:, 20:] = 1
    assert close(got[:, -1], model.forward(tokens, attention_mask=mask).logits[:, -1])


def test_quantized_cache_is_close_to_the_full_one() -> None:
    model, tokens = build(head_dim=64), ids(1, 16)
    cache = [QuantizedKVCache(group_size=64, bits=8) for _ in model.layers]
    parts = [model(tokens[:, :10], cache), model(tokens[:, 10:11], cache), model(tokens[:, 11:], cache)]
    difference = mx.abs(mx.concatenate(parts, axis=1) - model(tokens)).max().item()
    assert 0 < difference < 0.2
    with pytest.raises(InputError, match="output_attentions"):
        model.forward(tokens[:, :1], cache=cache, output_attentions=True)


def spy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    masks: list[Any] = []
    real = mx.fast.scaled_dot_product_attention

    def attention(*args: Any, **kwargs: Any) -> mx.array:
        masks.append(kwargs["mask"])
        return real(*args, **kwargs)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    return masks


def test_prefill_and_decode_make_no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = build(), spy(monkeypatch)
    cache = model.make_cache()
    model(ids(), cache)
    model(ids(2, 1), cache)
    model(ids(2, 5), cache)
    assert masks == ["causal", "causal", None, None, "causal", "causal"]
    masks.clear()
    model.forward(ids(), use_cache=False)
    model.forward(ids(), position_ids=mx.arange(L)[None], use_cache=False)
    assert masks == ["causal"] * 4


def test_gradients_reach_every_parameter_and_compiling_changes_nothing() -> None:
    model, tokens = build(attention_bias=True, mlp_bias=True), ids(2, 8)

    def loss(net: ArceeForCausalLM, x: mx.array) -> mx.array:
        return net.forward(x, labels=x).loss

    value, gradients = nn.value_and_grad(model, loss)(model, tokens)
    assert all(mx.isfinite(g).all() and mx.abs(g).max() > 0 for _, g in tree_flatten(gradients))
    step = mx.compile(lambda x: nn.value_and_grad(model, loss)(model, x), inputs=model.state)
    compiled_value, compiled = step(tokens)
    assert compiled_value.item() == pytest.approx(value.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(compiled), tree_flatten(gradients), strict=True):
        assert close(a, b, atol=1e-5), name


def test_gradient_is_the_slope() -> None:
    model, tokens = build("yarn", seed=3), ids(1, 8)

    def loss(net: ArceeForCausalLM) -> mx.array:
        return net.forward(tokens, labels=tokens).loss

    gradients = nn.value_and_grad(model, loss)(model)[1]
    layer, direction = model.layers[0].mlp.up_proj, mx.random.normal((48, 32), key=mx.random.key(2))
    weight, step = layer.weight, 1e-2
    layer.weight = weight + step * direction
    above = loss(model).item()
    layer.weight = weight - step * direction
    below = loss(model).item()
    slope = (gradients["model"]["layers"][0]["mlp"]["up_proj"]["weight"] * direction).sum().item()
    assert (above - below) / (2 * step) == pytest.approx(slope, rel=0.02, abs=1e-3)


def test_dropout_acts_in_training_only() -> None:
    plain, model, tokens = build(), build(attention_dropout=0.5), ids()
    assert mx.array_equal(model(tokens), plain(tokens))
    model.train()
    mx.random.seed(0)
    first = model(tokens)
    assert not close(first, plain(tokens), atol=1e-3)
    mx.random.seed(0)
    assert mx.array_equal(model(tokens), first)
    x, attention = mx.ones((1, 4, 32)), model.layers[0].self_attn
    average = mx.mean(mx.stack([attention(x, rotation(model, 4), Mask("causal"), None)[0] for _ in range(400)]), axis=0)
    expected = plain.layers[0].self_attn(x, rotation(model, 4), Mask("causal"), None)[0]
    assert close(average, expected, atol=0.3 * mx.abs(expected).max().item())  # six standard deviations


def rotation(model: ArceeForCausalLM, length: int) -> Any:
    rope = model.model.rotary_emb
    return rope.rotation(mx.arange(length)[None], rope.base_table, mx.float32)


def test_tied_head_is_the_embedding() -> None:
    model = build(tie_word_embeddings=True)
    assert "lm_head" not in model
    h = mx.random.normal((1, 2, 32), key=mx.random.key(0))
    assert close(model.logits(h), h @ model.model.embed_tokens.weight.T)
    assert "lm_head" in ArceeForCausalLM(model.config, tied=False)


def test_parameter_names_are_the_checkpoints_keys() -> None:
    names = {
        name for name, _ in tree_flatten(build(num_hidden_layers=1, attention_bias=True, mlp_bias=True).parameters())
    }
    layer = "model.layers.0."
    projections = [f"self_attn.{p}_proj" for p in "qkvo"] + ["mlp.up_proj", "mlp.down_proj"]
    assert names == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        layer + "input_layernorm.weight", layer + "post_attention_layernorm.weight",
        *(f"{layer}{p}.{kind}" for p in projections for kind in ("weight", "bias")),
    }  # fmt: skip


def test_mlp_is_ungated_squared_relu() -> None:
    model = build()
    mlp, x = model.layers[0].mlp, mx.random.normal((1, 3, 32), key=mx.random.key(0))
    assert close(mlp(x), mx.square(mx.maximum(x @ mlp.up_proj.weight.T, 0)) @ mlp.down_proj.weight.T)


def test_every_activation_the_config_accepts_exists_and_differs_from_the_others() -> None:
    assert set(ACTIVATIONS) == set(ACTIVATION_NAMES)
    points = mx.linspace(-15, 15, 301)
    values = {
        name: np.array(ACTIVATIONS[name](points))
        for name in ("relu", "relu2", "relu6", "silu", "gelu", "gelu_10", "tanh", "mish")
    }
    for a in values:
        for b in values:
            assert a == b or np.abs(values[a] - values[b]).max() > 1e-3


def test_norm_is_cast_before_its_weight_in_half_precision() -> None:
    norm = build().layers[0].input_layernorm
    norm.weight = (1 + mx.random.normal((32,), key=mx.random.key(0))).astype(mx.bfloat16)
    x = mx.random.normal((64, 32), key=mx.random.key(1)).astype(mx.bfloat16)
    wide = x.astype(mx.float32)
    normed = wide * mx.rsqrt(mx.mean(wide * wide, axis=-1, keepdims=True) + 1e-5)
    right = norm.weight * normed.astype(mx.bfloat16)
    wrong = (norm.weight.astype(mx.float32) * normed).astype(mx.bfloat16)
    assert mx.mean(norm(x) != right).item() < 0.01 < mx.mean(wrong != right).item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_stays_half_and_close(dtype: mx.Dtype) -> None:
    model, tokens = build("yarn"), ids()
    exact = model(tokens)
    model.set_dtype(dtype)
    logits = model(tokens)
    assert logits.dtype == dtype
    assert mx.abs(logits.astype(mx.float32) - exact).max().item() < 0.4
    output = model.forward(tokens, labels=tokens)
    assert output.loss is not None and output.loss.dtype == mx.float32


def test_base_model_is_the_causal_model_without_head() -> None:
    model, tokens = build(), ids()
    base = ArceeModel(model.config)
    base.update(model.model.parameters())
    assert mx.array_equal(model.logits(base(tokens)), model(tokens))
    assert mx.array_equal(base.forward(tokens).last_hidden_state, base(tokens))


def test_call_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("dynamic"), ids()
    cache = model.make_cache()

    def refuse(*_: Any) -> None:
        raise AssertionError("evaluated")

    monkeypatch.setattr(mx, "eval", refuse)
    monkeypatch.setattr(mx.array, "item", refuse)
    monkeypatch.setattr(mx.array, "tolist", refuse)
    model(tokens, cache)
    model(tokens[:, :1], cache)
