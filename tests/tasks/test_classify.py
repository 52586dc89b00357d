"""What `classify` makes of texts: the scores of the token the model's rule takes, however many texts go together."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from arcee_mlx import ArceeForSequenceClassification, Tokenizer, classify
from arcee_mlx.errors import InputError
from arcee_mlx.tasks import batches

from conftest import TEXT
from task_data import ROPES, TEXTS, build, make_tokenizer

LABELS = {0: "speech", 1: "novel", 2: "poem"}
PAD = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make(rope: str = "default", **changes: Any) -> Any:
    return build(rope, ArceeForSequenceClassification, **{"id2label": LABELS, "pad_token_id": PAD, **changes})


def logits_alone(model: Any, ids: list[int]) -> np.ndarray:
    """By the model's rule for a row of its own."""
    places = [i for i, token in enumerate(ids) if token != model.config.pad_token_id]
    return np.array(model.score(model.model(mx.array([ids]))[0, max(places, default=0)]))


def by_name(result: Any) -> list[float]:
    return [{each.label: each.score for each in result.scores}[name] for name in LABELS.values()]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_each_text_alone(tokenizer: Tokenizer, rope: str, batch_size: int) -> None:
    model = make(rope, max_position_embeddings=40)
    most = batches.context_tokens(model.config)
    texts = [text for text in [*TEXTS, "a<pad><pad>", "<pad>"] if len(tokenizer.encode(text)) <= most]
    found = classify(model, tokenizer, texts, function_to_apply="none", batch_size=batch_size)
    for text, result in zip(texts, found, strict=True):
        np.testing.assert_allclose(by_name(result), logits_alone(model, tokenizer.encode(text)), atol=1e-5)


@pytest.mark.parametrize("pad", [PAD, None, -1])
def test_alone_is_what_forward_gives(tokenizer: Tokenizer, pad: int | None) -> None:
    model = make(pad_token_id=pad)
    for text in ["a", TEXT, "", "Call<pad>", "<pad>me<pad>"]:
        expected = np.array(model.forward(mx.array([tokenizer.encode(text)])).logits)[0]
        found = classify(model, tokenizer, [TEXT, text], function_to_apply="none")[1]
        np.testing.assert_allclose(by_name(found), expected, atol=1e-5)


def test_long_texts_in_parts_are_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    monkeypatch.setattr(batches, "_TOKENS_TOGETHER", 7)
    for text, result in zip(TEXTS, classify(model, tokenizer, TEXTS, function_to_apply="none"), strict=True):
        np.testing.assert_allclose(by_name(result), logits_alone(model, tokenizer.encode(text)), atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "function"),
    [
        ({}, "softmax"),
        ({"problem_type": "single_label_classification"}, "softmax"),
        ({"problem_type": "multi_label_classification"}, "sigmoid"),
        ({"problem_type": "regression"}, "none"),
        ({"id2label": {0: "spam"}}, "sigmoid"),
    ],
)
def test_scores_follow_the_problem(tokenizer: Tokenizer, changes: dict[str, Any], function: Any) -> None:
    model = make(**changes)
    found = classify(model, tokenizer, ["Call me"])[0]
    assert found == classify(model, tokenizer, ["Call me"], function_to_apply=function)[0]
    plain = np.sort(logits_alone(model, tokenizer.encode("Call me")).astype(np.float64))[::-1]
    powers = np.exp(plain)
    expected = {"softmax": powers / powers.sum(), "sigmoid": powers / (1 + powers), "none": plain}[function]
    np.testing.assert_allclose([each.score for each in found.scores], expected, atol=1e-6)


def test_the_best_labels_come_first_and_as_many_as_asked_for(tokenizer: Tokenizer) -> None:
    model = make()
    full = classify(model, tokenizer, TEXTS)
    assert {result.label for result in full} > {full[0].label}
    for result, best in zip(full, classify(model, tokenizer, TEXTS, top_k=2), strict=True):
        assert [each.score for each in result.scores] == sorted((each.score for each in result.scores), reverse=True)
        assert (result.label, result.score) == (result.scores[0].label, result.scores[0].score)
        assert best.scores == result.scores[:2]


def test_huge_logits_give_sure_scores(tokenizer: Tokenizer) -> None:
    model = make()
    model.score.weight = model.score.weight * 1e5
    for function in ("softmax", "sigmoid"):
        scores = by_name(classify(model, tokenizer, ["a"], function_to_apply=function)[0])
        assert set(scores) <= {0.0, 1.0}


def test_a_pair_is_read_as_the_tokenizer_puts_it_together(tokenizer: Tokenizer) -> None:
    model = make()
    alone, pair = classify(model, tokenizer, ["Call me", ("Call me", "Ishmael.")], function_to_apply="none")
    ids = tokenizer.encode("Call me", add_special_tokens=False) + tokenizer.encode("Ishmael.", add_special_tokens=False)
    np.testing.assert_allclose(by_name(pair), logits_alone(model, ids), atol=1e-5)
    assert classify(model, tokenizer, [("Call me", "")], function_to_apply="none") == [alone]


def test_a_quantized_base_keeps_its_float_head(tokenizer: Tokenizer) -> None:
    model = make()
    nn.quantize(model.model, group_size=32, bits=8)
    found = classify(model, tokenizer, TEXTS, function_to_apply="none")
    for text, result in zip(TEXTS, found, strict=True):
        np.testing.assert_allclose(by_name(result), logits_alone(model, tokenizer.encode(text)), atol=1e-5)


def test_a_cut_text_is_its_first_tokens(tokenizer: Tokenizer) -> None:
    model = make()
    found = classify(model, tokenizer, [TEXT], max_length=20, truncate=True, function_to_apply="none")[0]
    np.testing.assert_allclose(by_name(found), logits_alone(model, tokenizer.encode(TEXT)[:20]), atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([TEXT], {"max_length": 5}, "text 0: has .* expected at most 5"),
        ("a", {}, "texts is a single text"),
        ([("a", "b", "c")], {}, "text 0: is a tuple of 3"),
        ([("a", 1)], {}, "text 0: text is of type int"),
        (["a"], {"top_k": 0}, "top_k is 0"),
        (["a"], {"function_to_apply": "max"}, "function_to_apply is 'max'; expected one of softmax, sigmoid, none"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_classified_is_refused(tokenizer: Tokenizer, texts: Any, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        classify(make(), tokenizer, texts, **options)


def test_another_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="is of type ArceeForCausalLM; expected ArceeForSequenceClassification"):
        classify(build(), tokenizer, ["a"])


def test_a_text_without_a_token_is_refused_by_its_place(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="text 1: has no tokens"):
        classify(make(), make_tokenizer(tmp_path, "$A"), ["a", ""])


def test_of_no_texts_there_are_no_labels(tokenizer: Tokenizer) -> None:
    assert classify(make(), tokenizer, []) == []
