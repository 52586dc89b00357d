"""Checkpoints of classifiers: which class, which head, what is new, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import (
    ArceeForCausalLM,
    ArceeForQuestionAnswering,
    ArceeForSequenceClassification,
    ArceeForTokenClassification,
    ArceeModel,
    Engine,
    generate,
    load,
    load_model,
    save_checkpoint,
)
from arcee_mlx.checkpoint.tokenizer import read_tokenizer
from arcee_mlx.errors import CheckpointError, ConfigError, InputError

from conftest import tiny_config, write_tokenizer

SEQUENCE, TOKEN, QA = ArceeForSequenceClassification, ArceeForTokenClassification, ArceeForQuestionAnswering
HEADS = [SEQUENCE, TOKEN, QA]
HEAD_KEYS = {SEQUENCE: ["score.weight"], TOKEN: ["score.bias", "score.weight"], QA: ["qa_outputs.bias", "qa_outputs.weight"]}  # fmt: skip
IDS = mx.array([[5, 17, 300, 42, 9]])


def make(cls: Any, **changes: Any) -> Any:
    mx.random.seed(1)
    model = cls(tiny_config(id2label={0: "a", 1: "b", 2: "c"}, **changes))
    model.load_weights([(n, 0.3 * mx.random.normal(v.shape)) for n, v in tree_flatten(model.parameters())])
    return model.eval()


def write(folder: Path, model: Any) -> Path:
    save_checkpoint(model, folder)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop(folder: Path, *keys: str) -> None:
    path = str(folder / "model.safetensors")
    tensors = {key: value for key, value in mx.load(path).items() if key not in keys}
    mx.eval(tensors)
    mx.save_safetensors(path, tensors)


def flat(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = flat(one), flat(other)
    return a.keys() == b.keys() and all(mx.array_equal(a[key], b[key]) for key in a)


def scores(model: Any) -> mx.array:
    output = model.forward(IDS)
    return output.start_logits if isinstance(model, QA) else output.logits


@pytest.mark.parametrize("cls", HEADS)
def test_saved_classifier_loads_as_it_was(tmp_path: Path, cls: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make(cls, problem_type="multi_label_classification", classifier_dropout=0.3)
    loaded = load_model(write(tmp_path / "x", model))
    assert type(loaded) is cls and same(model, loaded) and not caplog.records
    assert loaded.config.id2label == {0: "a", 1: "b", 2: "c"} and loaded.config.label2id == {"a": 0, "b": 1, "c": 2}
    assert (loaded.config.problem_type, loaded.config.classifier_dropout) == ("multi_label_classification", 0.3)
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("source", [ArceeModel, ArceeForCausalLM, QA])
def test_a_new_head_is_said_in_one_line_and_draws_no_random_number(
    tmp_path: Path, source: Any, cls: Any, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    if cls is source:
        return
    folder = write(tmp_path / "x", make(source))
    mx.random.seed(5)
    before = mx.random.state[0].tolist()
    models = [load_model(folder, cls, dtype=dtype) for _ in range(2)]
    assert mx.random.state[0].tolist() == before
    assert same(*models)
    assert {str(value.dtype) for value in flat(models[0]).values()} == {f"mlx.core.{dtype}"}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert caplog.records[0].name == "arcee_mlx"
    message = caplog.records[0].getMessage()
    assert message == f"{folder}: has no {', '.join(HEAD_KEYS[cls])}: new, at random; train before use"


@pytest.mark.parametrize("cls", HEADS)
def test_a_classifier_without_its_head_is_an_error_that_names_it(tmp_path: Path, cls: Any) -> None:
    folder = write(tmp_path / "x", make(cls))
    drop(folder, HEAD_KEYS[cls][-1])
    with pytest.raises(CheckpointError, match=rf"has no tensor '{HEAD_KEYS[cls][-1]}'.*the head cannot be made up"):
        load_model(folder)
    with pytest.raises(CheckpointError, match=HEAD_KEYS[cls][-1]):
        load_model(folder, cls)


def test_labels_given_make_the_head_and_its_names(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", make(ArceeForCausalLM))
    change_config(folder, id2label=None, label2id=None)
    model = load_model(folder, SEQUENCE, num_labels=5, problem_type="regression")
    assert model.score.weight.shape == (5, 64) and model.config.problem_type == "regression"
    assert model.config.id2label == {i: f"LABEL_{i}" for i in range(5)}
    named = load_model(folder, TOKEN, id2label={0: "O", 1: "NAME"})
    assert named.score.weight.shape == (2, 64) and named.config.label2id == {"O": 0, "NAME": 1}


def test_a_pad_token_may_be_given(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", make(SEQUENCE))
    rows = mx.array([[5, 17, 4, 4], [7, 8, 9, 10]])
    with pytest.raises(InputError, match="2 rows, and no pad_token_id"):
        load_model(folder).forward(rows)
    model = load_model(folder, pad_token_id=4)
    assert mx.allclose(model.forward(rows).logits[0], model.forward(rows[:1, :2]).logits[0], atol=1e-5)
    save_checkpoint(model, tmp_path / "y")
    assert load_model(tmp_path / "y").config.pad_token_id == 4
    with pytest.raises(ConfigError, match="pad_token_id is 400"):
        load_model(folder, pad_token_id=400)


def test_another_number_of_labels_than_the_head_has_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", make(SEQUENCE))
    with pytest.raises(CheckpointError, match=r"'score.weight' has shape \(3, 64\); expected \(4, 64\)"):
        load_model(folder, num_labels=4)
    assert load_model(folder, id2label={0: "x", 1: "y", 2: "z"}).config.id2label == {0: "x", 1: "y", 2: "z"}


@pytest.mark.parametrize("cls", [ArceeForCausalLM, ArceeModel, QA])
def test_labels_for_a_class_that_has_none_are_refused(tmp_path: Path, cls: Any) -> None:
    folder = write(tmp_path / "x", make(ArceeForCausalLM))
    with pytest.raises(InputError, match=f"for {cls.__name__}; expected ArceeForSequenceClassification"):
        load_model(folder, cls, num_labels=2)


def test_a_head_of_another_kind_in_the_file_is_not_taken(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", make(QA))
    assert same(load_model(folder, ArceeModel), make(QA).transformer)
    model = load_model(folder, SEQUENCE)
    assert same(model.model, make(QA).transformer) and not isinstance(model, QA)


def quantize(model: Any, path_bits: Any) -> Any:
    nn.quantize(model.base_model if hasattr(model, "base_model") else model, group_size=32, class_predicate=path_bits)
    return model


def mixed(path: str, module: nn.Module) -> bool | dict[str, int]:
    if not hasattr(module, "to_quantized") or "o_proj" in path:
        return False
    return {"group_size": 32, "bits": 8} if "down_proj" in path or "embed" in path else {"group_size": 64, "bits": 4}


@pytest.mark.parametrize("cls", HEADS)
def test_float_head_on_a_quantized_decoder_loads_as_it_was(tmp_path: Path, cls: Any) -> None:
    model = quantize(make(cls), mixed)
    folder = write(tmp_path / "x", model)
    loaded = load_model(folder)
    assert same(model, loaded) and mx.array_equal(scores(loaded), scores(model))
    head = loaded.qa_outputs if cls is QA else loaded.score
    assert type(head) is nn.Linear and type(loaded.layers[0].mlp.up_proj) is nn.QuantizedLinear


@pytest.mark.parametrize("target", [ArceeModel, *HEADS])
@pytest.mark.parametrize("source", [ArceeModel, ArceeForCausalLM, QA])
def test_mixed_quantization_survives_every_change_of_prefix(tmp_path: Path, source: Any, target: Any) -> None:
    model = make(source)
    nn.quantize(model, class_predicate=lambda path, module: "qa_outputs" not in path and mixed(path, module))
    loaded: Any = load_model(write(tmp_path / "x", model), target)
    one, other = (
        m if isinstance(m, ArceeModel) else m.transformer if isinstance(m, QA) else m.model for m in (model, loaded)
    )
    assert same(one, other)


@pytest.mark.parametrize("cls", HEADS)
def test_no_text_comes_from_a_classifier(tmp_path: Path, cls: Any) -> None:
    folder = write(tmp_path / "x", make(cls, tie_word_embeddings=True))
    for call in (load, Engine.load):
        with pytest.raises(ConfigError, match=f"architectures names '{cls.__name__}', which generates no text"):
            call(folder)
    write_tokenizer(folder)
    with pytest.raises(InputError, match=f"{cls.__name__} generates no text"):
        generate(load_model(folder), read_tokenizer(folder), "Hello")


@pytest.mark.parametrize("cls", HEADS)
def test_a_classifier_asked_for_as_a_causal_model_lacks_its_head(tmp_path: Path, cls: Any) -> None:
    folder = write(tmp_path / "x", make(cls))
    with pytest.raises(CheckpointError, match=rf"'lm_head.weight'.*this is a checkpoint of {cls.__name__}"):
        load_model(folder, ArceeForCausalLM)


@pytest.mark.parametrize("cls", [ArceeForCausalLM, *HEADS])
def test_a_second_head_in_the_file_is_unexpected(tmp_path: Path, cls: Any) -> None:
    folder = write(tmp_path / "x", make(cls))
    path, other = str(folder / "model.safetensors"), "lm_head.weight" if cls is not ArceeForCausalLM else "score.weight"
    mx.save_safetensors(path, {**{k: mx.array(v) for k, v in flat(make(cls)).items()}, other: mx.zeros((3, 64))})
    with pytest.raises(CheckpointError, match=f"holds '{other}'"):
        load_model(folder)
    assert same(load_model(folder, ArceeModel), make(cls).base_model if cls in HEADS else make(cls).model)


def test_a_bias_that_the_head_does_not_have_is_unexpected(tmp_path: Path) -> None:
    folder = write(tmp_path / "x", make(TOKEN))
    change_config(folder, architectures=["ArceeForSequenceClassification"])
    with pytest.raises(CheckpointError, match="holds 'score.bias'"):
        load_model(folder)
    change_config(folder, architectures=["ArceeForTokenClassification"])
    assert mx.array_equal(load_model(folder, SEQUENCE).score.weight, make(TOKEN).score.weight)
