"""Masks and packed positions against transformers: what they hide, and which are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402

from arcee_mlx import ArceeForCausalLM, load_model  # noqa: E402
from arcee_mlx.errors import InputError  # noqa: E402
from arcee_mlx.model.masks import attention_mask_4d, packed_mask  # noqa: E402

from reference import TheirConfig, assert_close, both, random_ids, saved, tiny  # noqa: E402

pytestmark = pytest.mark.parity


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
