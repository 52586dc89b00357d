"""What `forward` takes and gives: kept logits, hidden states, attentions, caches, embeddings, and what it refuses."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.errors import InputError

from tiny_decoder import L, V, build, close, ids


def test_head_is_applied_to_the_kept_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    seen: list[tuple[int, ...]] = []
    monkeypatch.setattr(type(model), "logits", lambda self, h: (seen.append(h.shape), self.lm_head(h))[1])
    model.forward(ids(), logits_to_keep=1)
    model.forward(ids(), logits_to_keep=mx.array([0, 4, -1]))
    model.forward(ids(), logits_to_keep=mx.zeros((2, L), mx.bool_))
    assert seen == [(2, 1, 32), (2, 3, 32), (0, 32)]


@pytest.mark.parametrize(
    ("keep", "index"),
    [
        (0, slice(None)), (1, slice(-1, None)), (3, slice(-3, None)), (99, slice(None)), (-2, slice(2, None)),
        ([0, 5, -1], [0, 5, -1]), ([2, 2], [2, 2]),
    ],
    ids=str,
)  # fmt: skip
def test_kept_logits_are_those_of_the_full_pass(keep: Any, index: Any) -> None:
    model, tokens = build(), ids()
    full = np.array(model.forward(tokens).logits)
    keep = keep if isinstance(keep, int) else mx.array(keep)
    np.testing.assert_allclose(np.array(model.forward(tokens, logits_to_keep=keep).logits), full[:, index], atol=2e-5)


def test_logits_kept_per_row_and_by_mask() -> None:
    model, tokens = build(), ids()
    full = np.array(model.forward(tokens).logits)
    rows = mx.array([[1, 0], [3, -1]])
    np.testing.assert_allclose(
        np.array(model.forward(tokens, logits_to_keep=rows).logits),
        np.stack([full[0, [1, 0]], full[1, [3, -1]]]),
        atol=2e-5,
    )
    mask = mx.random.bernoulli(0.4, (2, L), key=mx.random.key(0))
    got = model.forward(tokens, logits_to_keep=mask).logits
    np.testing.assert_allclose(np.array(got), full[np.array(mask)], atol=2e-5)


@pytest.mark.parametrize(
    "keep",
    [
        mx.array([L]), mx.array([-L - 1]), mx.array([1.0]), mx.array([[0], [L]]), mx.zeros((3, 2), mx.int32),
        mx.zeros((2, L - 1), mx.bool_), mx.zeros((L + 1,), mx.bool_), mx.zeros((1, 1, 1), mx.int32), mx.array(1),
    ],
    ids=lambda keep: f"{keep.dtype}{keep.shape}",
)  # fmt: skip
def test_wrong_logits_to_keep_is_refused(keep: mx.array) -> None:
    with pytest.raises(InputError, match="logits_to_keep"):
        build().forward(ids(), logits_to_keep=keep)


def test_hidden_states_are_the_stream_and_end_after_the_norm() -> None:
    model, tokens = build(), ids()
    output = model.forward(tokens, output_hidden_states=True)
    states = output.hidden_states
    assert states is not None and len(states) == 3
    assert mx.array_equal(states[0], model.model.embed_tokens(tokens))
    assert mx.array_equal(states[-1], output.last_hidden_state)
    assert mx.array_equal(model.logits(states[-1]), output.logits)
    assert not mx.array_equal(states[1], states[2])
    assert model.forward(tokens).hidden_states is None
    for asked, kept in (([0, -1], {0, 2}), (1, {1}), ([-2], {1}), ([5, -9], set())):
        some = model.forward(tokens, output_hidden_states=asked).hidden_states or ()
        assert {i for i, state in enumerate(some) if state is not None} == kept
        assert all(state is None or mx.array_equal(state, states[i]) for i, state in enumerate(some))


def test_config_can_ask_for_hidden_states_and_attentions() -> None:
    output = build(output_hidden_states=True, output_attentions=True).forward(ids())
    assert output.hidden_states is not None and output.attentions is not None
    quiet = build(output_hidden_states=True).forward(ids(), output_hidden_states=False)
    assert quiet.hidden_states is None


def test_attentions_are_the_probabilities_behind_the_output() -> None:
    model, tokens = build(), ids(2, 6)
    plain, output = model.forward(tokens), model.forward(tokens, output_attentions=True)
    assert close(plain.logits, output.logits)
    assert output.attentions is not None and len(output.attentions) == 2
    for weights in output.attentions:
        assert weights.shape == (2, 4, 6, 6)
        assert close(weights.sum(axis=-1), mx.ones((2, 4, 6)), atol=1e-5)
        assert not mx.triu(weights, 1).any()
    cache = model.make_cache()
    model.forward(tokens[:, :4], cache=cache)
    late = model.forward(tokens[:, 4:], cache=cache, output_attentions=True).attentions
    assert late is not None and close(late[0], output.attentions[0][:, :, 4:])


def test_cache_is_made_filled_and_given_back() -> None:
    model, tokens = build(), ids(1, 6)
    assert model.forward(tokens).past_key_values is None
    assert model.forward(tokens, use_cache=False).past_key_values is None
    made = model.forward(tokens[:, :4], use_cache=True).past_key_values
    assert made is not None and made[0].offset == 4
    again = model.forward(tokens[:, 4:], cache=made, use_cache=False)
    assert again.past_key_values is made and made[0].offset == 6
    assert close(again.logits, model.forward(tokens).logits[:, 4:])


def test_embeddings_instead_of_ids() -> None:
    model, tokens = build(), ids()
    h = model.model.embed_tokens(tokens)
    assert mx.array_equal(model.forward(inputs_embeds=h).logits, model.forward(tokens).logits)
    assert mx.array_equal(model(None, None, h), model(tokens))  # type: ignore[arg-type]


def test_ids_of_any_integer_type_and_container_mean_the_same() -> None:
    model, expected = build(), build().forward(mx.array([[1, 2, 39]])).logits
    for given in (
        [[1, 2, 39]],
        np.array([[1, 2, 39]]),
        mx.array([[1, 2, 39]], mx.uint8),
        mx.array([[1, 2, 39]], mx.int64),
    ):
        assert mx.array_equal(model.forward(given).logits, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected exactly one"),
        ({"input_ids": mx.array([[1]]), "inputs_embeds": mx.zeros((1, 1, 32))}, "expected exactly one"),
        ({"input_ids": mx.array([[1, V]])}, f"input_ids holds {V}; expected ids from 0 to {V - 1}"),
        ({"input_ids": mx.array([[-1, 1]])}, "input_ids holds -1"),
        ({"input_ids": mx.array([[2**40]])}, "input_ids holds"),
        ({"input_ids": mx.array([[1.0]])}, "expected integers"),
        ({"input_ids": mx.array([[True]])}, "expected integers"),
        ({"input_ids": mx.array([1, 2])}, "input_ids has shape"),
        ({"input_ids": mx.zeros((1, 0), mx.int32)}, "1 rows of 0 tokens"),
        ({"input_ids": mx.zeros((0, 3), mx.int32)}, "0 rows of 3 tokens"),
        ({"inputs_embeds": mx.zeros((1, 3, 31))}, "inputs_embeds has shape"),
        ({"inputs_embeds": mx.zeros((1, 0, 32))}, "1 rows of 0 tokens"),
        ({"input_ids": mx.array([[1, 2]]), "position_ids": mx.array([[0, 1, 2]])}, "position_ids has shape"),
        ({"input_ids": mx.array([[1, 2]]), "position_ids": mx.array([0, 1])}, "position_ids has shape"),
        ({"input_ids": mx.array([[1, 2]]), "labels": mx.array([[1, V]])}, "labels holds"),
        ({"input_ids": mx.array([[1, 2]]), "labels": mx.array([[1, 2]]), "logits_to_keep": 1}, "labels hold 2 values"),
    ],
    ids=str,
)
def test_wrong_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build().forward(**arguments)


def test_cache_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="cache"):
        build().forward(ids(), cache=build().make_cache()[:1])
