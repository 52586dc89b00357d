"""New weights, dropout and gradient checkpointing: what training asks of the model classes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import arcee_mlx
from arcee_mlx import ArceeConfig, ArceeError, InputError
from arcee_mlx.upstream import mlx_lm_module

CONFIG = ArceeConfig(
    vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=4, attention_bias=True, mlp_bias=True, id2label={0: "a", 1: "b", 2: "c"},
    label2id={"a": 0, "b": 1, "c": 2},
)  # fmt: skip
IDS = mx.array([[7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 4, 4, 4]])
PADDING = (IDS != 4).astype(mx.int32)
TARGETS: dict[type[Any], dict[str, mx.array]] = {
    arcee_mlx.ArceeForCausalLM: {"labels": IDS},
    arcee_mlx.ArceeForSequenceClassification: {"labels": mx.array([2, 0])},
    arcee_mlx.ArceeForTokenClassification: {"labels": IDS % 3},
    arcee_mlx.ArceeForQuestionAnswering: {"start_positions": mx.array([1, 2]), "end_positions": mx.array([3, 4])},
}
CLASSES = [*TARGETS, arcee_mlx.ArceeModel]


@pytest.fixture(autouse=True)
def random_state() -> Iterator[None]:
    mx.random.seed(0)
    yield


def gradients(model: Any, **arguments: Any) -> tuple[float, dict[str, mx.array]]:
    """The loss and each parameter's gradient, from the same random state."""
    mx.random.seed(5)
    compute = nn.value_and_grad(model, lambda: model.forward(IDS, attention_mask=PADDING, **arguments).loss)
    loss, tree = compute()
    return loss.item(), dict(tree_flatten(tree))


def assert_equal(a: dict[str, mx.array], b: dict[str, mx.array]) -> None:
    assert a.keys() == b.keys() and a
    assert [key for key in a if not mx.array_equal(a[key], b[key]).item()] == []


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cls", TARGETS)
def test_checkpointing_changes_no_bit_of_loss_or_gradients(cls: type[Any], dropout: float) -> None:
    model = cls.from_config(replace(CONFIG, attention_dropout=dropout, classifier_dropout=0.0), seed=1)
    kept = gradients(model, **TARGETS[cls])
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing and all(layer.gradient_checkpointing for layer in model.layers)
    before = dict(tree_flatten(model.parameters()))
    computed_again = gradients(model, **TARGETS[cls])
    assert kept[0] == computed_again[0]
    assert_equal(kept[1], computed_again[1])
    assert_equal(before, dict(tree_flatten(model.parameters())))
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert_equal(kept[1], gradients(model, **TARGETS[cls])[1])


def test_checkpointing_computes_a_layer_again_only_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    model = arcee_mlx.ArceeForCausalLM.from_config(CONFIG)
    calls: list[int] = []
    mlp = type(model.layers[0].mlp)
    compute = mlp.__call__
    monkeypatch.setattr(mlp, "__call__", lambda *arguments: calls.append(1) or compute(*arguments))
    for enabled, training, expected in ((False, True, 3), (True, False, 3), (True, True, 6)):
        (model.gradient_checkpointing_enable if enabled else model.gradient_checkpointing_disable)()
        calls.clear()
        gradients(model.train(training), labels=IDS)
        assert len(calls) == expected
    calls.clear()
    model(IDS, cache=model.make_cache())  # a cache is filled once
    assert len(calls) == 3


def test_checkpointing_needs_less_memory() -> None:
    config = replace(CONFIG, num_hidden_layers=8, intermediate_size=512)
    model = arcee_mlx.ArceeForSequenceClassification.from_config(config)
    ids, labels = mx.full((8, 64), 7), mx.zeros((8,), mx.int32)
    mx.eval(model.parameters(), ids, labels)
    peaks = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        mx.reset_peak_memory()
        mx.eval(nn.value_and_grad(model, lambda: model.forward(ids, labels=labels).loss)())
        peaks.append(mx.get_peak_memory() - mx.get_active_memory())
    assert peaks[1] < 0.5 * peaks[0], peaks


@pytest.mark.parametrize("quantized", [False, True])
def test_checkpointing_trains_adapters_alike_and_refuses_their_dropout(quantized: bool) -> None:
    model = arcee_mlx.ArceeForSequenceClassification.from_config(CONFIG)
    if quantized:
        nn.quantize(
            model, group_size=32, class_predicate=lambda path, m: hasattr(m, "to_quantized") and path != "score"
        )
    model.freeze()
    model.score.unfreeze()
    lora = {"rank": 2, "scale": 10.0, "dropout": 0.0}
    mlx_lm_module("tuner.utils").linear_to_lora_layers(model, 2, lora)
    kept = gradients(model, labels=mx.array([1, 2]))
    model.gradient_checkpointing_enable()
    computed_again = gradients(model, labels=mx.array([1, 2]))
    assert kept[0] == computed_again[0] and len(kept[1]) == 1 + 2 * 6 * 2
    assert_equal(kept[1], computed_again[1])
    with_dropout = arcee_mlx.ArceeForSequenceClassification.from_config(CONFIG)
    mlx_lm_module("tuner.utils").linear_to_lora_layers(with_dropout, 2, lora | {"dropout": 0.1})
    with_dropout.gradient_checkpointing_enable()
    with pytest.raises(InputError, match="dropout 0"):
        gradients(with_dropout, labels=mx.array([1, 2]))
    with_dropout.eval().forward(IDS)


def attend(model: Any) -> list[mx.array]:
    return list(model.forward(IDS[:1], output_attentions=True, use_cache=False).attentions)


def test_attention_dropout_is_torchs_in_distribution() -> None:
    share = 0.3
    config = replace(CONFIG, attention_dropout=share, num_hidden_layers=1)
    model = arcee_mlx.ArceeModel.from_config(config, seed=2)
    exact = attend(model.eval())[0]
    assert mx.array_equal(exact, attend(model)[0]).item() and mx.allclose(exact.sum(axis=-1), mx.array(1.0)).item()
    model.train()
    draws = mx.stack([attend(model)[0] for _ in range(400)])
    visible = mx.broadcast_to(exact > 0, draws.shape)
    scaled = exact / (1 - share)  # what torch keeps it multiplies by as much, and the rest is 0
    assert mx.all((draws == 0) | (mx.abs(draws - scaled) <= 1e-6)).item()
    count = visible.sum().item()
    dropped = ((draws == 0) & visible).sum().item()
    assert abs(dropped / count - share) < 5 * (share * (1 - share) / count) ** 0.5
    mean, deviation = draws.mean(axis=0), exact * (share / (1 - share) / 400) ** 0.5
    assert mx.all(mx.abs(mean - exact) <= 5 * deviation + 1e-6).item()
    together = ((draws[:-1] == 0) & (draws[1:] == 0) & visible[1:]).sum().item() / visible[1:].sum().item()
    assert abs(together - share**2) < 0.02  # one draw says nothing of the next


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("std", [0.02, 0.7, 0.0])
def test_new_weights_are_distributed_as_transformers_are(cls: type[Any], std: float) -> None:
    model = cls.from_config(replace(CONFIG, initializer_range=std, token_classification_bias=True), seed=3)
    expected = std or 0.02
    for name, array in tree_flatten(model.parameters()):
        assert array.dtype == mx.float32
        if array.ndim == 1:
            assert mx.all(array == (0 if name.endswith("bias") else 1)).item(), name
            continue
        if name.endswith("embed_tokens.weight"):
            assert mx.all(array[4] == 0).item()
            array = mx.concatenate([array[:4], array[5:]])
        z = array / expected
        bound = 5 / array.size**0.5
        assert abs(z.mean().item()) < bound and abs(z.square().mean().item() - 1) < 1.5 * bound, name
        if array.size > 5000:  # a normal's tails, not a uniform's
            assert abs((mx.abs(z) > 2).mean().item() - 0.0455) < 0.02 and mx.abs(z).max().item() > 3


def test_a_seed_gives_the_same_weights_and_touches_no_random_state() -> None:
    state: Any = mx.random.state
    before = state[0].tolist()
    one, again, other = (
        dict(tree_flatten(arcee_mlx.ArceeForCausalLM.from_config(CONFIG, seed=seed).parameters())) for seed in (1, 1, 2)
    )
    assert state[0].tolist() == before
    assert_equal(one, again)
    matrices = [key for key in one if one[key].ndim == 2]
    assert not any(mx.array_equal(one[key], other[key]).item() for key in matrices)
    alike = [(a, b) for a in matrices for b in matrices if a < b and one[a].shape == one[b].shape]
    assert alike and not any(mx.array_equal(one[a], one[b]).item() for a, b in alike)


@pytest.mark.parametrize("seed", [-1, 1.0, True])
def test_a_seed_that_is_none_is_refused(seed: Any) -> None:
    with pytest.raises(ArceeError, match="seed"):
        arcee_mlx.ArceeModel.from_config(CONFIG, seed=seed)


def test_looking_the_pad_token_up_trains_no_row_of_it_in_either_convention() -> None:
    """As torch's padding_idx: a tied row still learns from being predicted against, and an untied one not at all."""
    for tied in (False, True):
        model = arcee_mlx.ArceeForCausalLM.from_config(replace(CONFIG, tie_word_embeddings=tied), seed=1)

        def loss_of_call(model: Any = model) -> mx.array:
            return nn.losses.cross_entropy(model(IDS)[:, :-1], IDS[:, 1:]).mean()

        called = dict(tree_flatten(nn.value_and_grad(model, loss_of_call)()[1]))
        forward = nn.value_and_grad(model, lambda model=model: model.forward(IDS, labels=IDS).loss)
        expected = dict(tree_flatten(forward()[1]))
        assert [k for k in called if mx.abs(called[k] - expected[k]).max().item() > 1e-6] == []
        row = called["model.embed_tokens.weight"][CONFIG.pad_token_id]
        assert (mx.abs(row).max().item() > 0) is tied
