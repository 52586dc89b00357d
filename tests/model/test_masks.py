"""Which key a query sees, as arrays and as what it does to the model."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx.errors import InputError
from arcee_mlx.model.config import ArceeConfig
from arcee_mlx.model.decoder import ArceeForCausalLM
from arcee_mlx.model.masks import attention_mask_4d, causal_mask, packed_mask

B, H, L = 2, 4, 6


@pytest.fixture(scope="module")
def model() -> ArceeForCausalLM:
    mx.random.seed(3)
    config = ArceeConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
    )  # fmt: skip
    net = ArceeForCausalLM(config)
    net.eval()
    for _, module in net.named_modules():
        if isinstance(module, nn.Linear):
            module.weight = mx.random.normal(module.weight.shape) / module.weight.shape[1] ** 0.5
    mx.eval(net.parameters())
    return net


def ids(rows: int = B, length: int = L) -> mx.array:
    return mx.random.randint(0, 40, (rows, length), key=mx.random.key(1))


def visible(mask: Any) -> np.ndarray:
    return np.array(mask.hidden)[:, 0]


def oracle(padding: np.ndarray, offset: int, S: int) -> np.ndarray:
    padding = np.pad(padding, ((0, 0), (0, max(0, S - padding.shape[1]))))[:, :S].astype(bool)
    return np.tril(np.ones((S, S), bool))[offset:] & padding[:, None]


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("kind", ["left", "right", "hole", "bool", "float", "short", "long"])
def test_two_dimensional_mask_is_the_causal_rule_and_the_padding(offset: int, kind: str) -> None:
    S = offset + L
    padding = np.ones((B, S), np.int64)
    if kind == "left":
        padding[0, :4] = 0
    elif kind == "right":
        padding[0, -2:] = 0
    else:
        padding[0, 2] = 0
    if kind == "bool":
        padding = padding.astype(bool)
    if kind == "float":
        padding = padding * np.float32(0.5)
    if kind == "short":
        padding = padding[:, :-2]
    if kind == "long":
        padding = np.concatenate([padding, padding], axis=1)
    got = attention_mask_4d(mx.array(padding), B, H, L, offset, mx.float32, has_cache=True)
    assert got.hidden.shape == (B, 1, L, S) and got.hidden.dtype == mx.bool_
    np.testing.assert_array_equal(visible(got).any(axis=-1), np.array(got.sees)[:, 0, :, 0])
    np.testing.assert_array_equal(visible(got), oracle(padding, offset, S))


def test_mask_of_another_length_without_cache_is_refused_unless_it_hides_nothing_more() -> None:
    for length in (L - 2, L + 2):
        padding = np.ones((B, length), np.int64)
        padding[:, L:] = 0
        assert attention_mask_4d(mx.array(padding), B, H, L, 0, mx.float32, has_cache=False) == ("causal", None)
        padding[0, 1] = 0
        with pytest.raises(InputError, match=f"attention_mask has length {length}; expected {L}"):
            attention_mask_4d(mx.array(padding), B, H, L, 0, mx.float32, has_cache=False)


def test_bool_mask_of_four_dimensions_is_used_as_it_is() -> None:
    mask = mx.random.bernoulli(0.5, (B, 1, L, L), key=mx.random.key(0))
    assert mx.array_equal(attention_mask_4d(mask, B, H, L, 0, mx.float16, has_cache=False).hidden, mask)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_additive_mask_is_cast_and_stays_finite(dtype: mx.Dtype) -> None:
    mask = mx.where(mx.tri(L) > 0, 0.25, -mx.inf)[None, None]
    got = attention_mask_4d(mask, B, H, L, 0, dtype, has_cache=False).hidden
    assert got.dtype == dtype and mx.isfinite(got).all()
    assert mx.array_equal(got > -1000, mask > -1000)


@pytest.mark.parametrize(
    "shape", [(3, L), (1, L), (L,), (B, L, L), (B, 1, L, L + 1), (B, 1, L - 1, L), (3, 1, L, L), (B, 3, L, L)]
)
def test_mask_of_a_wrong_shape_is_refused(model: ArceeForCausalLM, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="attention_mask has shape"):
        mx.eval(model.forward(ids(), attention_mask=mx.ones(shape, mx.bool_), use_cache=False).logits)


def test_integer_mask_of_four_dimensions_is_refused(model: ArceeForCausalLM) -> None:
    with pytest.raises(InputError, match="dtype"):
        model.forward(ids(), attention_mask=mx.tril(mx.ones((B, 1, L, L), mx.int32)))


@pytest.mark.parametrize("rows", [1, 2])
def test_one_sequence_needs_no_array(rows: int) -> None:
    assert packed_mask(mx.broadcast_to(mx.arange(5, 9), (rows, 4))) == ("causal", None)
    assert packed_mask(mx.array([[3]] * rows)) == (None, None)
    assert causal_mask(5, None) == ("causal", None)
    assert causal_mask(1, None) == (None, None)


def test_packed_positions_are_blocks() -> None:
    got = visible(packed_mask(mx.array([[0, 1, 2, 0, 1, 5], [0, 1, 2, 3, 4, 5]])))
    sequence = np.array([[0, 0, 0, 1, 1, 2], [0] * 6])
    np.testing.assert_array_equal(got, (sequence[:, :, None] == sequence[:, None]) & np.tril(np.ones((6, 6), bool)))


def test_packed_sequences_are_separate_calls(model: ArceeForCausalLM) -> None:
    tokens = ids(1, 9)
    together = model.forward(tokens, position_ids=mx.array([[0, 1, 2, 0, 1, 0, 1, 2, 3]]), use_cache=False).logits
    apart = [model.forward(tokens[:, a:b], use_cache=False).logits for a, b in ((0, 3), (3, 5), (5, 9))]
    assert mx.allclose(together, mx.concatenate(apart, axis=1), atol=1e-5)


def test_positions_pack_only_without_cache_and_mask(model: ArceeForCausalLM) -> None:
    tokens, positions = ids(1, 4), mx.array([[0, 1, 0, 1]])
    packed = model.forward(tokens, position_ids=positions, use_cache=False).logits
    for others in (
        {"use_cache": True},
        {},
        {"cache": model.make_cache()},
        {"attention_mask": mx.ones((1, 4)), "use_cache": False},
    ):
        assert not mx.allclose(model.forward(tokens, position_ids=positions, **others).logits, packed, atol=1e-3)


def test_positions_of_one_row_serve_all(model: ArceeForCausalLM) -> None:
    tokens, positions = ids(), mx.array([[0, 1, 2, 0, 1, 2]])
    one = model.forward(tokens, position_ids=positions, use_cache=False).logits
    assert mx.allclose(
        one, model.forward(tokens, position_ids=mx.concatenate([positions] * B), use_cache=False).logits, atol=1e-6
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_are_the_rows_alone(model: ArceeForCausalLM, side: str) -> None:
    tokens, mask = ids(), mx.ones((B, L), mx.int32)
    if side == "left":
        mask[0, :2] = 0
        positions = mx.maximum(mx.cumsum(mask, axis=1) - 1, 0)
        alone, part = tokens[:1, 2:], slice(2, None)
    else:
        mask[0, -2:] = 0
        positions = None
        alone, part = tokens[:1, :-2], slice(None, -2)
    got = model.forward(tokens, attention_mask=mask, position_ids=positions).logits
    assert mx.allclose(got[:1, part], model.forward(alone).logits, atol=1e-5)
    assert mx.allclose(got[1:], model.forward(tokens[1:]).logits, atol=1e-5)


def test_a_hidden_token_changes_nothing_that_is_visible(model: ArceeForCausalLM) -> None:
    tokens, mask = ids(), mx.ones((B, L), mx.int32)
    mask[:, 2] = 0
    other = mx.array(tokens)
    other[:, 2] = (tokens[:, 2] + 1) % 40
    a, b = (model.forward(t, attention_mask=mask).logits for t in (tokens, other))
    keep = mx.array([0, 1, 3, 4, 5])
    assert mx.allclose(a[:, keep], b[:, keep], atol=1e-6)
    assert not mx.allclose(a[:, 2], b[:, 2], atol=1e-3)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("form", ["left", "all", "4d_bool", "4d_inf", "4d_min"])
def test_rows_that_see_nothing_stay_finite_with_finite_gradients(
    model: ArceeForCausalLM, form: str, dtype: mx.Dtype
) -> None:
    keys = mx.array([[0, 0, 0, 1, 1, 1], [1] * 6]) if form != "all" else mx.zeros((B, L), mx.int32)
    mask = keys
    if form.startswith("4d"):
        mask = (mx.tri(L) > 0)[None, None] & (keys > 0)[:, None, None]
        if form != "4d_bool":
            mask = mx.where(mask, 0.0, -mx.inf if form == "4d_inf" else mx.finfo(mx.float32).min)
    net = ArceeForCausalLM(model.config)
    net.update(model.parameters())
    net.set_dtype(dtype)
    assert mx.isfinite(net.forward(ids(), attention_mask=mask).logits).all()
    labels = mx.where(keys > 0, ids(), -100) if form != "all" else ids()
    loss, gradients = nn.value_and_grad(net, lambda n: n.forward(ids(), attention_mask=mask, labels=labels).loss)(net)
    assert mx.isfinite(loss)
    assert all(mx.isfinite(gradient).all() for _, gradient in tree_flatten(gradients))


@pytest.mark.parametrize("form", ["left", "4d_bool", "4d_inf"])
def test_a_query_that_sees_nothing_attends_to_nothing(model: ArceeForCausalLM, form: str) -> None:
    # torch gives such a row an attention output of zero, which the loss of the first token after left padding contains.
    keys = mx.array([[0, 0, 0, 1, 1, 1], [1] * 6])
    mask = keys
    if form != "left":
        mask = (mx.tri(L) > 0)[None, None] & (keys > 0)[:, None, None]
        mask = mx.where(mask, 0.0, -mx.inf) if form == "4d_inf" else mask
    h = model.model.embed_tokens(ids())[0, :3]
    for layer in model.layers:
        h = h + layer.mlp(layer.post_attention_layernorm(h))
    got = model.forward(ids(), attention_mask=mask, use_cache=False).last_hidden_state[0, :3]
    assert mx.allclose(got, model.model.norm(h), atol=1e-5)


def test_left_padding_follows_the_sequence_through_the_cache(model: ArceeForCausalLM) -> None:
    tokens = ids(B, 9)
    mask = mx.ones((B, 9), mx.int32)
    mask[0, :3] = 0
    positions = mx.where(mask > 0, mx.cumsum(mask, axis=1) - 1, 0)
    full = model.forward(tokens, attention_mask=mask, position_ids=positions).logits
    cache = model.make_cache()
    parts = [
        model.forward(tokens[:, a:b], attention_mask=mask[:, :b], position_ids=positions[:, a:b], cache=cache).logits
        for a, b in ((0, 5), (5, 6), (6, 9))
    ]
    seen = mask[..., None] > 0
    assert mx.allclose(mx.where(seen, mx.concatenate(parts, axis=1), 0), mx.where(seen, full, 0), atol=1e-5)


def test_mask_with_a_rotating_or_batched_cache_is_refused(model: ArceeForCausalLM) -> None:
    from mlx_lm.models.cache import BatchKVCache

    for cache in (model.make_cache(max_kv_size=8), [BatchKVCache([0, 0]) for _ in model.layers]):
        with pytest.raises(InputError, match="attention_mask with a"):
            model.forward(ids(), attention_mask=mx.ones((B, L)), cache=cache)
