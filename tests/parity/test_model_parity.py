"""Logits, losses, caches and outputs against transformers on tiny random models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402
from transformers.models.arcee.modeling_arcee import ArceeRMSNorm  # noqa: E402

from arcee_mlx import ArceeForCausalLM, load_model  # noqa: E402
from arcee_mlx.errors import ArceeError, InputError  # noqa: E402

from parity_configs import CONFIGS, LONG, rope  # noqa: E402
from reference import ATOL, TheirCausalLM, as_numpy, assert_close, both, random_ids, saved, tiny  # noqa: E402

pytestmark = pytest.mark.parity


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
