"""Logits, losses, gradients, masks, caches and loading against transformers on tiny random models."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402
from transformers.models.arcee.modeling_arcee import ArceeRMSNorm, ArceeRotaryEmbedding  # noqa: E402

from arcee_mlx import ArceeConfig, ArceeForCausalLM, ArceeModel, load_model  # noqa: E402
from arcee_mlx.errors import ArceeError, CheckpointError, InputError  # noqa: E402
from arcee_mlx.model.masks import attention_mask_4d, packed_mask  # noqa: E402
from arcee_mlx.model.rope import RotaryEmbedding  # noqa: E402

from reference import (  # noqa: E402  # noqa: E402
    ATOL,
    TheirCausalLM,
    TheirConfig,
    as_numpy,
    assert_close,
    both,
    random_ids,
    saved,
    their_model,
    tiny,
)

pytestmark = pytest.mark.parity


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


@pytest.mark.parametrize("config_form", ["ours", "theirs"])
@pytest.mark.parametrize("name", CONFIGS)
def test_checkpoint_computes_what_transformers_computes(tmp_path: Path, name: str, config_form: str) -> None:
    # "ours": config.json in the form written above; "theirs": in the form save_pretrained gives it.
    theirs = saved(tiny(**CONFIGS[name]), tmp_path, seed=sum(map(ord, name)), config=config_form)
    model = load_model(tmp_path)
    ids, my_ids = both(random_ids((2, LONG)))
    with torch.no_grad():
        full = theirs(ids, use_cache=False, output_hidden_states=True)
        mine = model.forward(my_ids, use_cache=False, output_hidden_states=True)
        assert as_numpy(full.logits).std() > 0.5
        assert_close(mine.logits, full.logits)
        their_states = full.hidden_states or (
            full.logits.new_tensor(as_numpy(mine.last_hidden_state)),
        )  # () without layers
        assert mine.hidden_states is not None
        for state, expected in zip(mine.hidden_states, their_states, strict=True):
            assert_close(state, expected)

        for steps in ([LONG - 4, 1, 1, 1, 1], [5, 9, 3, LONG - 17]):  # decoding, and prefill in chunks
            their_cache, cache, start = transformers.DynamicCache(config=theirs.config), model.make_cache(), 0
            for step in steps:
                expected = theirs(ids[:, start : start + step], past_key_values=their_cache).logits
                assert_close(model.forward(my_ids[:, start : start + step], cache=cache).logits, expected)
                start += step

        padding = np.ones((2, LONG), np.int64)
        padding[0, :7] = 0
        padding[1, -5:] = 0
        mask, my_mask = both(padding)
        expected = theirs(ids, attention_mask=mask, use_cache=False).logits
        assert_close(model.forward(my_ids, attention_mask=my_mask, use_cache=False).logits, expected, where=padding > 0)
        expected = theirs(ids[:, :10], use_cache=False).logits  # short again: dynamic tables are set back
        assert_close(model.forward(my_ids[:, :10]).logits, expected)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ArceeForCausalLM]:
    folder = tmp_path_factory.mktemp("pair")
    return saved(tiny(), folder, seed=5), load_model(folder)


def masks(B: int, L: int, S: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    causal = np.tril(np.ones((S, S), bool))[S - L :]
    holes = rng.random((B, S)) < 0.7
    holes[:, 0] = True
    random4d = causal & (rng.random((B, 1, L, S)) < 0.7) | np.eye(S, dtype=bool)[S - L :]
    additive = np.where(random4d, rng.normal(size=random4d.shape), np.finfo(np.float32).min).astype(np.float32)
    return {
        "ones": np.ones((B, S), np.int64),
        "holes": holes.astype(np.int64),
        "holes_bool": holes,
        "holes_float": holes.astype(np.float32) * 0.5,
        "4d_bool": random4d,
        "4d_one_row": random4d[:1],
        "4d_heads": np.broadcast_to(random4d, (B, 4, L, S)) & (rng.random((B, 4, L, S)) < 0.8)
        | np.eye(S, dtype=bool)[S - L :],
        "4d_not_causal": np.ones((B, 1, L, S), bool),
        "4d_additive": additive,
        "4d_additive_inf": np.where(random4d, 0, -np.inf).astype(np.float32),
        "4d_broadcast_queries": np.broadcast_to(holes[:, None, None], (B, 1, 1, S)).copy(),
        "4d_additive_heads": np.repeat(additive, 4, axis=1)
        * np.array([0.5, 1, 0.25, 1], np.float32)[None, :, None, None],
    }


@pytest.mark.parametrize("cached", [0, 4], ids=["no_cache", "cache"])
@pytest.mark.parametrize("name", masks(2, 3, 5))
def test_mask_hides_what_it_hides_in_transformers(pair: tuple[Any, ArceeForCausalLM], name: str, cached: int) -> None:
    theirs, model = pair
    B, L = 2, 6
    ids, my_ids = both(random_ids((B, cached + L)))
    mask, my_mask = both(masks(B, L, cached + L)[name])
    with torch.no_grad():
        their_cache, cache = transformers.DynamicCache(config=theirs.config), model.make_cache()
        if cached:
            theirs(ids[:, :cached], past_key_values=their_cache)
            model.forward(my_ids[:, :cached], cache=cache)
        expected = theirs(ids[:, cached:], attention_mask=mask, past_key_values=their_cache).logits
        assert_close(model.forward(my_ids[:, cached:], attention_mask=my_mask, cache=cache).logits, expected)


@pytest.mark.parametrize("cached", [None, 0, 4], ids=["no_cache", "empty_cache", "cache"])
@pytest.mark.parametrize("L", [1, 6])
@pytest.mark.parametrize("length", ["0", "1", "-2", "-1", "+1", "+4"])
@pytest.mark.parametrize("fill", ["ones", "zeros_after", "hole"])
def test_mask_of_another_length_is_read_or_refused_as_in_transformers(
    pair: tuple[Any, ArceeForCausalLM], cached: int | None, L: int, length: str, fill: str
) -> None:
    theirs, model = pair
    offset = cached or 0
    S = offset + L
    size = S + int(length) if length[0] in "+-" else int(length)
    if size < 0:
        return
    ids, my_ids = both(random_ids((2, S)))
    padding = np.ones((2, size), np.int64)
    if fill == "zeros_after":
        padding[:, S:] = 0
    elif fill == "hole" and size > 1:
        padding[0, 0] = 0
    mask, my_mask = both(padding)
    their_cache = None if cached is None else transformers.DynamicCache(config=theirs.config)
    cache = None if cached is None else model.make_cache()
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        if offset:
            theirs(ids[:, :offset], past_key_values=their_cache)
            model.forward(my_ids[:, :offset], cache=cache)
        kwargs: dict[str, Any] = {"use_cache": False} if cached is None else {}
        try:
            expected = theirs(ids[:, offset:], attention_mask=mask, past_key_values=their_cache, **kwargs).logits
        except Exception:
            with pytest.raises(InputError, match="attention_mask"):
                model.forward(my_ids[:, offset:], attention_mask=my_mask, cache=cache, **kwargs)
            return
    mine = model.forward(my_ids[:, offset:], attention_mask=my_mask, cache=cache, **kwargs).logits
    seen = np.pad(padding, ((0, 0), (0, max(0, S - size))))[:, :S]
    rows = np.stack([np.cumsum(row)[offset:] > 0 for row in seen])  # a row that sees no key at all is left open
    assert_close(mine, expected, where=rows)


@pytest.mark.parametrize(
    "shape", [(2, 3, 6, 6), (3, 1, 6, 6), (2, 1, 6, 5), (2, 1, 6, 7), (2, 1, 5, 6), (1, 6), (2, 6, 6)], ids=str
)
@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32])
def test_mask_of_a_wrong_shape_is_refused_as_in_transformers(
    pair: tuple[Any, ArceeForCausalLM], shape: tuple[int, ...], dtype: Any
) -> None:
    assert_mask_refused(pair, np.arange(np.prod(shape)).reshape(shape).astype(dtype))


def test_integer_mask_of_four_dimensions_is_refused_as_in_transformers(pair: tuple[Any, ArceeForCausalLM]) -> None:
    # It could mean "visible" or an amount to add: added, ones would hide nothing.
    assert_mask_refused(pair, np.tril(np.ones((2, 1, 6, 6), np.int64)))


def assert_mask_refused(pair: tuple[Any, ArceeForCausalLM], mask: np.ndarray) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((2, 6)))
    with torch.no_grad(), pytest.raises(Exception):  # noqa: B017 - whatever torch says
        theirs(ids, attention_mask=torch.tensor(mask), use_cache=False)
    with pytest.raises(InputError):
        mx.eval(model.forward(my_ids, attention_mask=mx.array(mask), use_cache=False).logits)


POSITIONS = {
    "packed": [[0, 1, 2, 0, 1, 0, 1, 2]],
    "packed_rows": [[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7]],
    "gap": [[0, 1, 2, 10, 11, 12, 13, 14]],
    "repeats": [[3, 3, 3, 4, 5, 5, 6, 7]],
    "backwards": [[7, 6, 5, 4, 3, 2, 1, 0]],
    "offset": [[5, 6, 7, 8, 9, 10, 11, 12]],
    "negative": [[-1, 0, 1, 2, 3, 4, 5, 6]],
}


@pytest.mark.parametrize("use_cache", [None, True, False])
@pytest.mark.parametrize("name", POSITIONS)
def test_position_ids_pack_sequences_as_in_transformers(
    pair: tuple[Any, ArceeForCausalLM], name: str, use_cache: bool | None
) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((2, 8)))
    positions, my_positions = both(np.array(POSITIONS[name]))
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions, use_cache=use_cache)
    mine = model.forward(my_ids, position_ids=my_positions, use_cache=use_cache)
    assert_close(mine.logits, expected.logits)


def test_config_without_cache_packs_by_default(tmp_path: Path) -> None:
    theirs = saved(tiny(use_cache=False), tmp_path)
    ids, my_ids = both(random_ids((1, 8)))
    positions, my_positions = both(np.array(POSITIONS["packed"]))
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions).logits
    assert_close(load_model(tmp_path).forward(my_ids, position_ids=my_positions).logits, expected)


@pytest.mark.parametrize("padded", [False, True])
def test_attentions_are_transformers_attentions(tmp_path: Path, padded: bool) -> None:
    saved(tiny(rope_parameters=rope("yarn", factor=4.0)), tmp_path)
    theirs = TheirCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    model = load_model(tmp_path)
    ids, my_ids = both(random_ids((2, 7)))
    padding = np.ones((2, 7), np.int64)
    padding[0, :2] = 0
    mask, my_mask = both(padding)
    options: dict[str, Any] = {"attention_mask": mask} if padded else {}
    mine_options: dict[str, Any] = {"attention_mask": my_mask} if padded else {}
    with torch.no_grad():
        expected = theirs(ids, output_attentions=True, output_hidden_states=[0, -1], use_cache=False, **options)
    mine = model.forward(my_ids, output_attentions=True, output_hidden_states=[0, -1], use_cache=False, **mine_options)
    where = padding > 0
    assert mine.attentions is not None and len(mine.attentions) == len(expected.attentions)
    for got, want in zip(mine.attentions, expected.attentions, strict=True):
        assert_close(got.transpose(0, 2, 1, 3), want.transpose(1, 2), where=where)
    assert [state is None for state in mine.hidden_states] == [state is None for state in expected.hidden_states]
    assert_close(mine.hidden_states[-1], expected.hidden_states[-1], where=where)


@pytest.mark.parametrize("asked", [True, False, None, 0, 1, -1, [], [0], [1, -1], [-3, 5], [9]], ids=str)
def test_selected_hidden_states_are_those_transformers_selects(pair: tuple[Any, ArceeForCausalLM], asked: Any) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((1, 5)))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=asked).hidden_states
    mine = model.forward(my_ids, output_hidden_states=asked).hidden_states
    kept = {i: state for i, state in enumerate(expected or ()) if state is not None}
    got = {i: state for i, state in enumerate(mine or ()) if state is not None}
    assert got.keys() == kept.keys()
    for i, state in got.items():
        assert_close(state, kept[i])


KEEPS = {
    "all": 0, "one": 1, "many": 99, "negative": -2, "indices": np.array([0, 3, -1]), "repeated": np.array([2, 2]),
    "none": np.array([], np.int64), "per_row": np.array([[0, 1], [4, 2]]), "per_row_shared": np.array([[3, 0]]),
    "bool": np.array([[1, 0, 1, 0, 0], [0, 0, 0, 1, 0]], bool), "bool_1d": np.array([1, 0, 0, 1, 1], bool),
    "bool_nothing": np.zeros((2, 5), bool), "out_of_range": np.array([5]), "per_row_out": np.array([[0], [5]]),
    "per_row_negative": np.array([[-1], [0]]), "bool_short": np.ones((2, 4), bool), "three": np.ones((1, 1, 1), np.int64),
    "floats": np.array([1.0]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEEPS)
def test_logits_to_keep_keeps_or_refuses_as_transformers_does(pair: tuple[Any, ArceeForCausalLM], name: str) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((2, 5)))
    keep = KEEPS[name]
    try:
        with torch.no_grad():
            expected = theirs(ids, logits_to_keep=keep if isinstance(keep, int) else torch.tensor(keep)).logits
        if expected.ndim > 3 or name == "per_row_out":  # torch takes the remainder of a row's indices by L
            raise IndexError
    except (IndexError, RuntimeError):
        with pytest.raises(InputError, match="logits_to_keep"):
            model.forward(my_ids, logits_to_keep=mx.array(keep))
        return
    mine = model.forward(my_ids, logits_to_keep=keep if isinstance(keep, int) else mx.array(keep)).logits
    assert_close(mine, expected)


def losses(B: int, L: int) -> dict[str, dict[str, Any]]:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 61, (B, L))
    ignored = np.where(rng.random((B, L)) < 0.4, -100, labels)
    return {
        "plain": {"labels": labels},
        "ignored": {"labels": ignored},
        "num_items": {"labels": ignored, "num_items_in_batch": 7},
        "num_items_array": {"labels": ignored, "num_items_in_batch": np.array(7)},
        "all_ignored": {"labels": np.full((B, L), -100)},
        "all_ignored_sum": {"labels": np.full((B, L), -100), "num_items_in_batch": 3},
        "ignore_index": {"labels": labels, "ignore_index": int(labels[0, 2])},
        "ignore_index_of_no_label": {"labels": labels, "ignore_index": -1},
        "shifted": {"labels": labels, "shift_labels": ignored},
        "out_of_range": {"labels": np.full((B, L), 61)},
        "negative": {"labels": np.full((B, L), -1)},
        "too_short": {"labels": labels[:, 1:]},
        "kept_one": {"labels": labels, "logits_to_keep": 1},
        "kept_rows": {"labels": labels, "logits_to_keep": np.arange(L)},
        "kept_bool": {"labels": labels, "logits_to_keep": np.arange(B * L).reshape(B, L) % 2 == 0},
        "kept_and_shifted": {"labels": labels[:, :2], "shift_labels": labels[:, :2], "logits_to_keep": 2},
    }


@pytest.mark.parametrize("name", losses(2, 3))
def test_loss_is_transformers_loss(pair: tuple[Any, ArceeForCausalLM], name: str) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((2, 6)))
    options = losses(2, 6)[name]
    torch_options = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    mine_options = {k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    try:
        with torch.no_grad():
            expected = theirs(ids, use_cache=False, **torch_options).loss
    except Exception:
        with pytest.raises(InputError):
            model.forward(my_ids, use_cache=False, **mine_options)
        return
    assert_close(model.forward(my_ids, use_cache=False, **mine_options).loss, expected, atol=2e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_every_gradient_is_torch_autograds(tmp_path: Path, tied: bool) -> None:
    values = tiny(
        tie_word_embeddings=tied, attention_bias=True, mlp_bias=True, rope_parameters=rope("yarn", factor=4.0)
    )
    theirs = saved(values, tmp_path, seed=2)
    model = load_model(tmp_path)
    array = random_ids((2, 9))
    padding = np.ones((2, 9), np.int64)
    padding[0, :3] = 0
    labels = np.where(padding > 0, array, -100)
    ids, my_ids = both(array)
    (mask, my_mask), (targets, my_targets) = both(padding), both(labels)
    theirs(ids, attention_mask=mask, labels=targets, use_cache=False).loss.backward()

    def loss(net: ArceeForCausalLM) -> mx.array:
        return net.forward(my_ids, attention_mask=my_mask, labels=my_targets, use_cache=False).loss

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        size = float(expected[name].abs().max())
        assert size > 0, name
        assert_close(gradient, expected[name], atol=2e-5 * max(size, 1))


def assert_same_bits(mine: mx.array, reference: Any, about: Any) -> None:
    """Equal up to the last bits in which torch's vectorized pow, different on every CPU, is off."""
    a, b = np.array(mine), reference.numpy()
    assert a.shape == b.shape
    off = np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))
    assert off.max() <= 2, (off.tolist(), about)
    assert (off > 0).sum() <= 1 + off.size // 8, (off.tolist(), about)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
def test_rotation_table_is_transformers_to_the_last_bit(kind: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        half = int(rng.choice([2, 4, 8, 32, 64]))
        options: dict[str, Any] = {"rope_theta": float(rng.choice([1e4, 5e5, 1e6, 123456.7]))}
        options["factor"] = float(rng.choice([1.0, 2.0, 3.3, 20.0]))
        original = int(rng.choice([128, 4096, 8192]))
        if kind in ("yarn", "llama3", "longrope"):
            options["original_max_position_embeddings"] = original
        if kind == "yarn":
            options |= {
                "beta_fast": float(rng.choice([32, 8])),
                "beta_slow": float(rng.choice([1, 2])),
                "truncate": bool(rng.integers(2)),
            }
        if kind == "llama3":
            options |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0, 8.0]))}
        if kind == "longrope":
            options |= {key: (1 + rng.random(half) * 5).tolist() for key in ("short_factor", "long_factor")}
        if kind == "proportional":
            options["partial_rotary_factor"] = float(rng.choice([0.25, 0.5, 0.9, 1.0]))
        values = tiny(head_dim=2 * half, max_position_embeddings=65536, rope_parameters={"rope_type": kind, **options})
        reference = ArceeRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(values))))
        mine = RotaryEmbedding(ArceeConfig.from_dict(values))
        assert mine.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-14)
        assert_same_bits(mine.base_table, reference.original_inv_freq, options)
        if kind in ("dynamic", "longrope"):
            positions = torch.tensor([[65535 * (1 + int(rng.integers(3)))]])
            reference(torch.zeros(1), positions)
            assert_same_bits(mine.table(int(positions[0, 0]) + 1), reference.inv_freq, options)
            lengths = mx.array([5, int(positions[0, 0]) + 1])
            assert_same_bits(mine.table(lengths)[1], reference.inv_freq, options)


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "longrope", "llama3", "dynamic", "proportional"])
def test_far_positions_turn_as_in_transformers(name: str) -> None:
    values = tiny(
        max_position_embeddings=65536, **{k: v for k, v in CONFIGS[name].items() if k != "max_position_embeddings"}
    )
    reference = ArceeRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(values))))
    mine = RotaryEmbedding(ArceeConfig.from_dict(values))
    positions, my_positions = both(np.array([[0, 1, 4095, 4096, 30000, 65534, 65535]]))
    cos, sin = reference(torch.zeros(1), positions)
    got = mine.rotation(my_positions, mine.table(65536), mx.float32)
    half = cos.shape[-1] // 2
    np.testing.assert_allclose(np.array(got.cos)[0, :, 0, 0], cos[0, :, :half].numpy(), atol=2e-5)
    np.testing.assert_allclose(np.array(got.sin)[0, :, 0, 1], sin[0, :, :half].numpy(), atol=2e-5)
    np.testing.assert_array_equal(np.array(got.sin)[0, :, 0, 0], -np.array(got.sin)[0, :, 0, 1])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_state_follows_transformers_through_any_calls(kind: str) -> None:
    options = {"factor": 2.0} if kind == "dynamic" else {**FACTORS, "original_max_position_embeddings": 32}
    values = tiny(max_position_embeddings=32, rope_parameters=rope(kind, **options))
    rng = np.random.default_rng(11)
    for _ in range(20):
        reference = ArceeRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(values))))
        mine = RotaryEmbedding(ArceeConfig.from_dict(values))
        for length in rng.choice([1, 5, 31, 32, 33, 34, 40, 64, 100], 12):
            reference(torch.zeros(1), torch.tensor([[0, int(length) - 1]]))
            assert_same_bits(mine.forward_table(int(length)), reference.inv_freq, length)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norm_casts_before_its_weight(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(64, 48)) * 3, 1 + rng.normal(size=48)
    reference = ArceeRMSNorm(48, eps=1e-5)
    reference.weight.data = torch.tensor(w).to(getattr(torch, dtype))
    expected = reference(torch.tensor(x).to(getattr(torch, dtype)))
    norm = nn.RMSNorm(48, eps=1e-5)
    norm.weight = mx.array(w).astype(getattr(mx, dtype))
    got = norm(mx.array(x).astype(getattr(mx, dtype)))
    different = (as_numpy(got) != as_numpy(expected)).mean()
    assert different < 0.002  # with the weight before the cast a third of the values differ


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["default", "yarn", "biases", "tied"])
def test_half_precision_is_as_close_as_transformers_is(tmp_path: Path, name: str, dtype: str) -> None:
    saved(tiny(**CONFIGS[name]), tmp_path, seed=4)
    theirs = TheirCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    exact = TheirCausalLM.from_pretrained(tmp_path, dtype=dtype).eval().double()
    ids, my_ids = both(random_ids((2, LONG)))
    with torch.no_grad():
        half = as_numpy(theirs(ids).logits)
        truth = as_numpy(exact(ids).logits)
    mine = as_numpy(load_model(tmp_path, dtype=dtype).forward(my_ids).logits)
    assert np.abs(mine - half).max() < max(1e-2, 1.5 * np.abs(half - truth).max())


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.numpy import save_file

    tensors = {name: np.array(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without(*keys: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in keys}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        without("lm_head.weight"),
        lambda t: {**without("model.embed_tokens.weight")(t), "lm_head.weight": t["model.embed_tokens.weight"]},
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]},
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1},
        lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
        lambda t: {**t, "model.rotary_emb.inv_freq": np.ones(3, np.float64)},
        lambda t: {k.removeprefix("model."): v for k, v in t.items()},
    ],
    ids=[
        "as_saved",
        "no_head",
        "head_only",
        "both_equal",
        "both_differ",
        "stale_rope",
        "stale_rope_float64",
        "base_keys",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_head_is_tied_or_not_as_transformers_decides(tmp_path: Path, tied: bool, change: Any) -> None:
    saved(tiny(tie_word_embeddings=tied), tmp_path, config="theirs")
    rewrite(tmp_path, change)
    theirs, info = TheirCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    if info["missing_keys"]:
        with pytest.raises(CheckpointError, match=str(sorted(info["missing_keys"])[0])):
            load_model(tmp_path)
        return
    model = load_model(tmp_path)
    assert ("lm_head" not in model) == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
    ids, my_ids = both(random_ids((1, 5)))
    with torch.no_grad():
        assert_close(model.forward(my_ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("from_class", ["ArceeModel", "ArceeForCausalLM"])
@pytest.mark.parametrize("to_class", ["ArceeModel", "ArceeForCausalLM"])
def test_base_and_causal_checkpoints_load_into_each_other(tmp_path: Path, from_class: str, to_class: str) -> None:
    source = their_model(tiny(tie_word_embeddings=True), cls=getattr(transformers, from_class))
    source.save_pretrained(tmp_path)
    theirs = getattr(transformers, to_class).from_pretrained(tmp_path).eval()
    model = load_model(tmp_path, {"ArceeModel": ArceeModel, "ArceeForCausalLM": ArceeForCausalLM}[to_class])
    ids, my_ids = both(random_ids((1, 6)))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    mine = model.forward(my_ids, output_hidden_states=True)
    assert_close(mine.last_hidden_state, expected.hidden_states[-1])


@pytest.mark.parametrize("cls", ["ArceeForSequenceClassification", "ArceeForTokenClassification"])
def test_decoder_of_a_classifier_loads_as_the_base_model(tmp_path: Path, cls: str) -> None:
    their_model(tiny(), cls=getattr(transformers, cls)).save_pretrained(tmp_path)
    theirs = transformers.ArceeModel.from_pretrained(tmp_path).eval()
    ids, my_ids = both(random_ids((1, 6)))
    with torch.no_grad():
        assert_close(load_model(tmp_path, ArceeModel).forward(my_ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("stated", [{}, {"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": None, "torch_dtype": "float16"},
                                    {"dtype": "bfloat16", "torch_dtype": "float16"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("file", ["bfloat16", "norms_in_float32", "stale_rope_in_float32"])
def test_auto_dtype_is_the_one_transformers_chooses(tmp_path: Path, stated: dict[str, Any], file: str) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    saved(tiny(), tmp_path)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_torch(tmp_path / "model.safetensors").items()}
    if file == "norms_in_float32":
        tensors = {name: value.float() if "norm" in name else value for name, value in tensors.items()}
    if file == "stale_rope_in_float32":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_torch(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(tiny(**stated)))
    theirs = TheirCausalLM.from_pretrained(tmp_path, dtype="auto")
    model = load_model(tmp_path, dtype="auto")
    kinds = {str(value.dtype).removeprefix("mlx.core.") for _, value in tree_flatten(model.parameters())}
    assert kinds == {str(theirs.dtype).removeprefix("torch.")}


def test_greedy_continuation_is_transformers_generate(pair: tuple[Any, ArceeForCausalLM]) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((1, 5), seed=9))
    with torch.no_grad():
        expected = theirs.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:]
    cache, tokens, step = model.make_cache(), [], my_ids
    for _ in range(20):
        step = mx.argmax(model(step, cache)[:, -1], axis=-1)[:, None]
        tokens.append(step.item())
    assert tokens == expected.tolist()


def test_masks_are_the_arrays_transformers_builds() -> None:
    from transformers.masking_utils import create_causal_mask

    config = TheirConfig.from_dict(tiny())
    config._attn_implementation = "sdpa"
    embeds = torch.zeros(2, 6, 48)
    padding = np.array([[0, 0, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]])
    expected = create_causal_mask(config, embeds, torch.tensor(padding), None)
    got = attention_mask_4d(mx.array(padding), 2, 4, 6, 0, mx.float32, has_cache=False).hidden
    np.testing.assert_array_equal(np.array(got), expected.numpy())
    positions = np.array([[0, 1, 2, 0, 1, 2], [4, 5, 0, 0, 1, 7]])
    expected = create_causal_mask(config, embeds, None, None, position_ids=torch.tensor(positions))
    np.testing.assert_array_equal(np.array(packed_mask(mx.array(positions)).hidden), expected.numpy())


@pytest.mark.parametrize(
    "arguments", [{}, {"input_ids": 1, "inputs_embeds": 1}, {"input_ids": "out_of_range"}], ids=str
)
def test_input_that_transformers_refuses_is_refused(
    pair: tuple[Any, ArceeForCausalLM], arguments: dict[str, Any]
) -> None:
    theirs, model = pair
    ids, embeds = random_ids((1, 4)), np.zeros((1, 4, 48), np.float32)
    given: dict[str, np.ndarray] = {}
    if "input_ids" in arguments:
        given["input_ids"] = ids + 61 if arguments["input_ids"] == "out_of_range" else ids
    if "inputs_embeds" in arguments:
        given["inputs_embeds"] = embeds
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says
        theirs(**{k: torch.tensor(v) for k, v in given.items()})
    with pytest.raises(ArceeError):
        model.forward(**{k: mx.array(v) for k, v in given.items()})


def test_embeddings_then_tokens_continue_one_sequence(pair: tuple[Any, ArceeForCausalLM]) -> None:
    theirs, model = pair
    ids, my_ids = both(random_ids((2, 7)))
    embeds, my_embeds = both(np.random.default_rng(2).normal(size=(2, 4, 48)).astype(np.float32))
    their_cache, cache = transformers.DynamicCache(config=theirs.config), model.make_cache()
    with torch.no_grad():
        assert_close(
            model.forward(inputs_embeds=my_embeds, cache=cache).logits,
            theirs(inputs_embeds=embeds, past_key_values=their_cache).logits,
        )
        expected = theirs(ids, past_key_values=their_cache, use_cache=False).logits
    assert_close(model.forward(my_ids, cache=cache, use_cache=False).logits, expected)
    assert ATOL < 1e-3
