"""Heads by themselves: what they promise without a reference."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import arcee_mlx
from arcee_mlx import ArceeForQuestionAnswering, ArceeForSequenceClassification, ArceeForTokenClassification
from arcee_mlx.errors import ConfigError, InputError
from arcee_mlx.model.heads import set_labels
from arcee_mlx.model.relu2.down import store_by_neuron

from conftest import tiny_config

HEADS = [ArceeForSequenceClassification, ArceeForTokenClassification, ArceeForQuestionAnswering]
NAMES = {0: "no", 1: "maybe", 2: "yes"}
IDS = mx.array([[5, 17, 300, 42], [7, 255, 0, 0]])


def make(cls: Any, **changes: Any) -> Any:
    mx.random.seed(3)
    return cls(tiny_config(**{"id2label": NAMES, "pad_token_id": 0, **changes})).eval()


def scores(output: Any) -> mx.array:
    return output.start_logits if hasattr(output, "start_logits") else output.logits


@pytest.mark.parametrize("cls", HEADS)
def test_keys_are_the_checkpoints(cls: Any) -> None:
    keys = {key for key, _ in tree_flatten(make(cls).parameters())}
    prefix, head = ("transformer", "qa_outputs") if cls is ArceeForQuestionAnswering else ("model", "score")
    assert {key.split(".")[0] for key in keys} == {prefix, head}
    assert f"{prefix}.layers.0.self_attn.q_proj.weight" in keys
    assert (f"{head}.bias" in keys) == (cls is not ArceeForSequenceClassification)


@pytest.mark.parametrize("cls", HEADS)
def test_padding_at_the_end_changes_nothing(cls: Any) -> None:
    model = make(cls)
    both = scores(model.forward(IDS))
    alone = scores(model.forward(IDS[1:, :2]))
    assert mx.allclose(both[1:] if both.shape[-1] == 3 and both.ndim == 2 else both[1:, :2], alone, atol=1e-5)


@pytest.mark.parametrize("cls", HEADS)
def test_it_is_not_called_as_a_language_model(cls: Any) -> None:
    with pytest.raises(InputError, match=f"{cls.__name__} generates no text.*forward"):
        make(cls)(IDS)


def test_dropout_of_a_tagger_is_for_training_only() -> None:
    model = make(ArceeForTokenClassification, classifier_dropout=0.5)
    still = model.forward(IDS).logits
    assert mx.array_equal(still, model.forward(IDS).logits)
    model.train()
    mx.random.seed(0)
    kept = [model.forward(IDS).logits for _ in range(400)]
    assert not mx.array_equal(kept[0], kept[1])
    mean = mx.stack(kept).mean(axis=0)
    assert mx.abs(mean - still).max() < 0.15 * mx.abs(kept[0] - still).max()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 0.1), ({"hidden_dropout": 0.2}, 0.2), ({"classifier_dropout": 0.3, "hidden_dropout": 0.2}, 0.3),
     ({"classifier_dropout": 0.0}, 0.0), ({"classifier_dropout": 1.0}, None), ({"hidden_dropout": "x"}, None)],
    ids=str,
)  # fmt: skip
def test_dropout_is_the_first_that_is_named(changes: dict[str, Any], expected: float | None) -> None:
    if expected is None:
        with pytest.raises(ConfigError, match="_dropout is"):
            make(ArceeForTokenClassification, **changes)
        return
    model = make(ArceeForTokenClassification, **changes).train()
    dropped = model.dropout(mx.ones((100_000,)))
    assert (dropped == 0).mean().item() == pytest.approx(expected, abs=0.01)


def test_a_head_needs_a_label() -> None:
    with pytest.raises(ConfigError, match="id2label is {}; expected at least one label"):
        make(ArceeForSequenceClassification, id2label={})


@pytest.mark.parametrize("cls", HEADS)
def test_head_begins_the_same_whatever_the_random_state(cls: Any) -> None:
    one = make(cls)
    mx.random.seed(99)
    other = cls(one.config)
    name = "qa_outputs" if cls is ArceeForQuestionAnswering else "score"
    assert mx.array_equal(one[name].weight, other[name].weight)
    assert not mx.array_equal(one.layers[0].mlp.up_proj.weight, other.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("cls", HEADS)
def test_down_projections_by_neuron_compute_the_same(cls: Any) -> None:
    model = make(cls)
    before = scores(model.forward(IDS))
    store_by_neuron(model)
    assert mx.allclose(scores(model.forward(IDS)), before, atol=1e-5)
    assert model.config.down_proj_layout == model.base_model.config.down_proj_layout == "by_neuron"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"num_labels": 3}, NAMES), ({"num_labels": 2}, {0: "LABEL_0", 1: "LABEL_1"}), ({"id2label": {1: "b", 0: "a"}}, {0: "a", 1: "b"}),
     ({"id2label": {0: "a"}, "num_labels": 1}, {0: "a"}), ({"problem_type": "regression"}, NAMES)],
    ids=str,
)  # fmt: skip
def test_labels_are_set_and_named(given: dict[str, Any], expected: dict[int, str]) -> None:
    config = tiny_config(id2label=NAMES)
    changed = set_labels(config, **given)
    assert changed.id2label == expected and changed.problem_type == given.get("problem_type")
    assert changed.to_dict()["label2id"] == {name: i for i, name in expected.items()}
    assert config.id2label == NAMES and config.problem_type is None


@pytest.mark.parametrize(
    ("given", "message"),
    [({"num_labels": 0}, "num_labels is 0"), ({"num_labels": True}, "num_labels is True"), ({"num_labels": 2.0}, "num_labels is 2.0"),
     ({"id2label": {}}, "id2label has the keys"), ({"id2label": {1: "a"}}, "id2label has the keys"),
     ({"id2label": {0: "a"}, "num_labels": 2}, "names 1 labels for num_labels 2"), ({"problem_type": "x"}, "problem_type is 'x'")],
    ids=str,
)  # fmt: skip
def test_labels_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        set_labels(tiny_config(), **given)


def test_one_label_is_no_choice() -> None:
    with pytest.raises(ConfigError, match="problem_type"):
        set_labels(tiny_config(), num_labels=1, problem_type="single_label_classification")


def test_a_classifier_learns() -> None:
    import mlx.optimizers as optim

    model = make(ArceeForSequenceClassification).train()
    ids, labels = mx.array([[5, 6, 7], [8, 9, 7], [3, 10, 7]]), mx.array([0, 1, 2])
    optimizer = optim.Adam(learning_rate=3e-3)
    step = nn.value_and_grad(model, lambda net: net.forward(ids, labels=labels).loss)
    losses = []
    for _ in range(60):
        loss, gradients = step(model)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert model.eval().forward(ids).logits.argmax(axis=1).tolist() == [0, 1, 2]


def test_outputs_are_frozen_and_exported() -> None:
    output = make(ArceeForSequenceClassification).forward(IDS)
    assert isinstance(output, arcee_mlx.SequenceClassifierOutput)
    with pytest.raises(dataclasses.FrozenInstanceError):
        output.loss = 1
