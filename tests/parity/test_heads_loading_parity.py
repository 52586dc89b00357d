"""Checkpoints of classifiers between transformers and here: both ways, sharded, from one class to another."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402

import arcee_mlx  # noqa: E402
from arcee_mlx import load_model, save_checkpoint  # noqa: E402
from arcee_mlx.checkpoint import files  # noqa: E402
from arcee_mlx.errors import CheckpointError  # noqa: E402

from reference import assert_close, random_ids, their_model, tiny  # noqa: E402

pytestmark = pytest.mark.parity

BASE, CAUSAL, SEQUENCE = "ArceeModel", "ArceeForCausalLM", "ArceeForSequenceClassification"
TOKEN, QA = "ArceeForTokenClassification", "ArceeForQuestionAnswering"
HEADS = [SEQUENCE, TOKEN, QA]
IDS = random_ids((2, 7))
TARGETS: dict[str, dict[str, np.ndarray]] = {
    SEQUENCE: {"labels": np.array([2, 0])},
    TOKEN: {"labels": IDS % 3},
    QA: {"start_positions": np.array([1, 5]), "end_positions": np.array([3, 6])},
}
LABELS = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}


def their_checkpoint(folder: Path, cls: str, *, seed: int = 1, shard_size: str = "1GB", **changes: Any) -> None:
    values = tiny(**{"architectures": [cls], "pad_token_id": 0, **LABELS, **changes})
    model = their_model(values, seed=seed, cls=getattr(transformers, cls))
    model.save_pretrained(folder, max_shard_size=shard_size)


def assert_same_numbers(theirs: Any, model: Any) -> None:
    targets = TARGETS[type(model).__name__]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(IDS), **{k: torch.tensor(v) for k, v in targets.items()})
    mine = model.forward(mx.array(IDS), **{k: mx.array(v) for k, v in targets.items()})
    for name in ("logits", "start_logits", "end_logits", "loss"):
        if name in expected:
            assert_close(getattr(mine, name), expected[name])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("cls", HEADS)
def test_a_checkpoint_goes_there_and_back(
    tmp_path: Path, cls: str, sharded: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    their_checkpoint(tmp_path / "theirs", cls, shard_size="20KB" if sharded else "1GB", tie_word_embeddings=tied)
    model = load_model(tmp_path / "theirs")
    assert type(model).__name__ == cls
    assert_same_numbers(getattr(transformers, cls).from_pretrained(tmp_path / "theirs"), model)

    if sharded:
        monkeypatch.setattr(files, "plan_shards", functools.partial(files.plan_shards, shard_bytes=20_000))
    save_checkpoint(model, tmp_path / "ours")
    for folder in ("theirs", "ours"):
        assert (len(list((tmp_path / folder).glob("*.safetensors"))) > 2) == sharded
    back, info = getattr(transformers, cls).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert_same_numbers(back, load_model(tmp_path / "ours"))


@pytest.mark.parametrize(
    "changes",
    [{}, {"id2label": None, "label2id": None}, {"problem_type": "multi_label_classification"}, {"id2label": {"0": "x"}, "label2id": {"x": 0}},
     {"classifier_dropout": 0.3, "hidden_dropout": 0.2}, {"hidden_dropout": 0.2}, {"token_classification_bias": False}],
    ids=str,
)  # fmt: skip
def test_config_of_a_classifier_comes_back_the_same(tmp_path: Path, changes: dict[str, Any]) -> None:
    their_checkpoint(tmp_path / "theirs", TOKEN, **changes)
    before = transformers.ArceeForTokenClassification.from_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    assert model.config.num_labels == before.config.num_labels
    save_checkpoint(model, tmp_path / "ours")
    after = transformers.ArceeForTokenClassification.from_pretrained(tmp_path / "ours")
    left_out = {"transformers_version", "_name_or_path"}
    assert {k: v for k, v in after.config.to_dict().items() if k not in left_out} == {
        k: v for k, v in before.config.to_dict().items() if k not in left_out
    }
    assert after.dropout.p == before.dropout.p and (after.score.bias is None) == (before.score.bias is None)


@pytest.mark.parametrize("to_class", [BASE, CAUSAL, *HEADS])
@pytest.mark.parametrize("from_class", [BASE, CAUSAL, *HEADS])
def test_any_class_gives_its_decoder_to_any_other(tmp_path: Path, from_class: str, to_class: str) -> None:
    their_checkpoint(tmp_path, from_class)
    theirs, info = getattr(transformers, to_class).from_pretrained(tmp_path, output_loading_info=True)
    asked = getattr(arcee_mlx, to_class)
    if "lm_head.weight" in info["missing_keys"]:
        with pytest.raises(CheckpointError, match=r"'lm_head.weight'.*the head cannot be made up"):
            load_model(tmp_path, asked)
        return
    model = load_model(tmp_path, asked)
    mine = dict(tree_flatten(model.parameters()))
    expected = {key: value.detach() for key, value in theirs.named_parameters()}
    assert mine.keys() == expected.keys()
    new = {key for key in info["missing_keys"] if key.split(".")[0] in ("score", "qa_outputs")}
    if (QA in (from_class, to_class)) and from_class not in (to_class, BASE):
        # transformers does not know its own prefix `transformer.` and makes a new decoder; here it is kept.
        source = getattr(transformers, from_class).from_pretrained(tmp_path)
        prefix = {BASE: "", QA: "transformer."}.get(to_class, "model.")
        expected = {prefix + key: value.detach() for key, value in source.base_model.named_parameters()}
    for key, value in expected.items():
        if key not in new:
            assert_close(mine[key], value, atol=0)
    for key in new:
        assert mx.array_equal(mine[key], mx.zeros_like(mine[key])) if key.endswith("bias") else mine[key].std() > 0.01


def test_causal_checkpoint_becomes_a_classifier_that_transformers_loads(tmp_path: Path) -> None:
    their_checkpoint(tmp_path / "causal", CAUSAL, id2label=None, label2id=None)
    model = load_model(
        tmp_path / "causal", arcee_mlx.ArceeForSequenceClassification, id2label={0: "a", 1: "b", 2: "c", 3: "d"},
        problem_type="single_label_classification",
    )  # fmt: skip
    assert "id2label" not in json.loads((tmp_path / "causal" / "config.json").read_text())
    save_checkpoint(model, tmp_path / "ours")
    theirs, info = transformers.ArceeForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()) and theirs.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert theirs.config.problem_type == "single_label_classification"
    assert_same_numbers(theirs, model)


def test_new_head_is_as_wide_as_transformers_new_head(tmp_path: Path) -> None:
    their_checkpoint(tmp_path, CAUSAL, initializer_range=0.05)
    theirs = transformers.ArceeForTokenClassification.from_pretrained(tmp_path, num_labels=200)
    model = load_model(tmp_path, arcee_mlx.ArceeForTokenClassification, num_labels=200)
    assert model.config.id2label == theirs.config.id2label and model.config.label2id == theirs.config.label2id
    assert tuple(model.score.weight.shape) == tuple(theirs.score.weight.shape)
    assert model.score.weight.std().item() == pytest.approx(theirs.score.weight.std().item(), rel=0.05)
    assert abs(model.score.weight.mean().item()) < 0.002 and not model.score.bias.any() and not theirs.score.bias.any()
