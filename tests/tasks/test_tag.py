"""What `tag` finds in texts: labelled pieces where they stand, however many texts go together."""

from __future__ import annotations

from typing import Any, get_args

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import ArceeForTokenClassification, Tokenizer, tag
from arcee_mlx.errors import InputError
from arcee_mlx.tasks import Aggregation, batches

from conftest import TEXT
from task_data import ROPES, TEXTS, build, build_by_token, make_tokenizer

LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "MISC"}
UNICODE = [
    "Grüße 日本語🙂",
    "👩‍👩‍👧 me 👩‍👩‍👧",
    "e\u0301 cafe\u0301 \u0301",
    "\U0001f1e9\U0001f1ea\u200d",
    " \n\t a",
    "\r\n",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), "<s> $A </s>")


def make(rope: str = "default", **changes: Any) -> Any:
    return build(rope, ArceeForTokenClassification, **{"id2label": LABELS, **changes})


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_tokens_are_tagged_as_in_each_text_alone(tokenizer: Tokenizer, rope: str, batch_size: int) -> None:
    model = make(rope, max_position_embeddings=40)
    most = batches.context_tokens(model.config)
    texts = [text for text in TEXTS if len(tokenizer.encode(text)) <= most]
    for text, found in zip(texts, tag(model, tokenizer, texts, ignore_labels=[], batch_size=batch_size), strict=True):
        encoding = tokenizer.encode_with_offsets(text)
        logits = np.array(model.score(model.model(mx.array([encoding.ids]))))[0, 1:-1].astype(np.float64)
        expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        assert [entity.label for entity in found] == [LABELS[best] for best in expected.argmax(axis=1)]
        assert [(entity.start, entity.end) for entity in found] == encoding.offsets[1:-1]
        np.testing.assert_allclose([entity.score for entity in found], expected.max(axis=1), atol=1e-5)


def test_long_texts_in_parts_are_the_same(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    whole = tag(model, tokenizer, TEXTS)
    monkeypatch.setattr(batches, "_TOKENS_TOGETHER", 7)
    for one, other in zip(tag(model, tokenizer, TEXTS), whole, strict=True):
        assert [(e.label, e.start, e.end, e.word) for e in one] == [(e.label, e.start, e.end, e.word) for e in other]
        np.testing.assert_allclose([e.score for e in one], [e.score for e in other], atol=1e-5)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_pieces_stand_where_they_say_in_any_text(tokenizer: Tokenizer, aggregation: Any) -> None:
    texts = [TEXT, *UNICODE]
    for text, found in zip(texts, tag(make(), tokenizer, texts, aggregation, ignore_labels=[]), strict=True):
        assert found and found[-1].end == len(text)
        assert all(0 <= entity.start < entity.end <= len(text) for entity in found)
        assert [entity.start for entity in found] == sorted(entity.start for entity in found)
        whole = "".join(entity.word for entity in found)
        if aggregation != "none" and "\ufffd" not in whole:  # where no group parts a character's bytes
            assert whole == text


def test_tokens_words_and_groups_by_hand(tokenizer: Tokenizer) -> None:
    text = "a worldyx years meyx"
    values = {
        "Ġworld": [0.0, 1.0, 0.0, 0.0, 0.0],
        "x": [0.0, 0.0, 0.0, 0.6, 0.8],
        "Ġyears": [0.0, 0.0, 1.0, 0.0, 0.0],
        "Ġme": [0.0] * 5,
    }
    outputs = {tokenizer.token_id(token) or 0: logits for token, logits in values.items()}
    model = build_by_token(ArceeForTokenClassification, outputs, id2label=LABELS)
    powers = {token: np.exp(8 * np.array(logits)) for token, logits in values.items()}  # 8 is the norm's
    world, x, years, other = (power / power.sum() for power in powers.values())

    def found(aggregation: Any) -> list[tuple[str, str, float]]:
        entities = tag(model, tokenizer, [text], aggregation)[0]
        return [(entity.label, text[entity.start : entity.end], entity.score) for entity in entities]

    def close(score: float) -> Any:
        return pytest.approx(score, abs=1e-5)

    assert found("none") == [
        ("B-PER", " world", close(world[1])),
        ("MISC", "x", close(x[4])),
        ("I-PER", " years", close(years[2])),
        ("MISC", "x", close(x[4])),
    ]
    assert found("simple") == [
        ("PER", " world", close(world[1])),
        ("MISC", "x", close(x[4])),
        ("PER", " years", close(years[2])),
        ("MISC", "x", close(x[4])),
    ]
    both = (world[1] + years[2]) / 2
    assert found("first") == [("PER", " worldyx years", close(both))]
    assert found("max") == [("PER", " worldyx years", close(both)), ("MISC", " meyx", close(x[4]))]
    word = (world + other + x) / 3
    assert found("average") == [
        ("PER", " worldyx years", close((word[1] + years[2]) / 2)),
        ("MISC", " meyx", close(((2 * other + x) / 3)[4])),
    ]


def test_two_that_begin_stay_two_and_one_that_goes_on_joins(tokenizer: Tokenizer) -> None:
    outputs = {tokenizer.token_id("Ġme") or 0: [0.0, 1.0, 0.0], tokenizer.token_id("Ġof") or 0: [0.0, 0.0, 1.0]}
    model = build_by_token(ArceeForTokenClassification, outputs, id2label={0: "O", 1: "B-A", 2: "I-A"})
    text = "a me me of of a of"
    found = tag(model, tokenizer, [text], "simple")[0]
    assert [(entity.label, text[entity.start : entity.end]) for entity in found] == [
        ("A", " me"), ("A", " me of of"), ("A", " of"),
    ]  # fmt: skip


def test_what_the_tokenizer_puts_around_a_text_is_never_tagged(tokenizer: Tokenizer) -> None:
    everything = {token: [0.0, 1.0] for token in range(400)}
    model = build_by_token(ArceeForTokenClassification, everything, id2label={0: "O", 1: "B-A"})
    assert tag(model, tokenizer, [""]) == [[]]
    assert [entity.word for entity in tag(model, tokenizer, ["Call me"])[0]] == ["Call", "Ġme"]


def test_labels_are_left_out_as_asked(tokenizer: Tokenizer) -> None:
    everything = tag(make(), tokenizer, [TEXT], "simple", ignore_labels=[])[0]
    assert {entity.label for entity in everything} == {"O", "PER", "LOC", "MISC"}
    kept = tag(make(), tokenizer, [TEXT], "simple", ignore_labels=["O", "PER"])[0]
    assert kept == [entity for entity in everything if entity.label in ("LOC", "MISC")]


def test_of_a_cut_text_the_first_tokens_are_tagged(tokenizer: Tokenizer) -> None:
    cut = tag(make(), tokenizer, [TEXT], max_length=20, truncate=True, ignore_labels=[])[0]
    whole = tag(make(), tokenizer, [TEXT], ignore_labels=[])[0]
    assert [entity.start for entity in cut] == [entity.start for entity in whole[:18]]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([TEXT], "none"), {"max_length": 5}, "text 0: has .* expected at most 5"),
        ((["a"], "last"), {}, "aggregation is 'last'; expected one of none, simple, first, average, max"),
        ((["a"],), {"ignore_labels": "O"}, "ignore_labels is the single text 'O'"),
    ],
)
def test_what_cannot_be_tagged_is_refused(tokenizer: Tokenizer, arguments: Any, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        tag(make(), tokenizer, *arguments, **options)


def test_another_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="is of type ArceeForCausalLM; expected ArceeForTokenClassification"):
        tag(build(), tokenizer, ["a"])
