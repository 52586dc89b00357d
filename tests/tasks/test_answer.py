"""What `answer` finds in contexts: the likeliest spans, in windows that see all of a long one."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import AnswerSpan, ArceeForQuestionAnswering, Tokenizer, answer
from arcee_mlx.errors import InputError
from arcee_mlx.tasks import batches
from arcee_mlx.tasks.answer import AnswerOptions, Question, answer_questions

from conftest import TEXT
from task_data import ROPES, build, build_by_token, make_tokenizer

QUESTION = "Who is it?"
CONTEXTS = [TEXT, "", "Call me Ishmael.", "Grüße, 日本語 🙂", TEXT[30:90], "a"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), pair="<s> $A </s> $B </s>")


@pytest.fixture(scope="module")
def finder(tokenizer: Tokenizer) -> Any:
    """A model for which answers begin at ` Ishmael` and end at ` world`, wherever these stand."""
    outputs = {tokenizer.token_id("ĠIshmael") or 0: [1.0, 0.0], tokenizer.token_id("Ġworld") or 0: [0.0, 1.0]}
    return build_by_token(ArceeForQuestionAnswering, outputs)


def make(rope: str = "default", **changes: Any) -> Any:
    return build(rope, ArceeForQuestionAnswering, **changes)


def alone(model: Any, tokenizer: Tokenizer, context: str, longest: int) -> AnswerSpan:
    """The best span of a context in one window, by numpy, without a look at words."""
    encoding = tokenizer.encode_with_offsets(QUESTION, context)
    own = [i for i, kind in enumerate(encoding.sequence_ids) if kind == 1]
    logits = np.array(model.qa_outputs(model.transformer(mx.array([encoding.ids]))))[0, own].astype(np.float64)
    starts, ends = (np.exp(logits) / np.exp(logits).sum(axis=0)).T
    products = np.tril(np.triu(np.outer(starts, ends)), longest - 1)
    first, last = np.unravel_index(products.argmax(), products.shape)
    start, end = encoding.offsets[own[first]][0], encoding.offsets[own[last]][1]
    return AnswerSpan(context[start:end], products.max(), start, end)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("longest", [1, 4])
def test_spans_are_the_likeliest_of_each_context_alone(
    tokenizer: Tokenizer, rope: str, batch_size: int, longest: int
) -> None:
    model = make(rope, max_position_embeddings=48)
    most = batches.context_tokens(model.config)
    contexts = [c for c in CONTEXTS if c and len(tokenizer.encode_with_offsets(QUESTION, c).ids) <= most]
    assert len(contexts) >= 3
    options = AnswerOptions(max_answer_len=longest, align_to_words=False)
    asked = [Question("q", QUESTION, context) for context in contexts]
    for context, found in zip(
        contexts, answer_questions(model, tokenizer, asked, options, batch_size=batch_size), strict=True
    ):
        expected = alone(model, tokenizer, context, longest)
        assert (found[0].answer, found[0].start, found[0].end) == (expected.answer, expected.start, expected.end)
        assert found[0].score == pytest.approx(expected.score, abs=1e-5)


def test_many_questions_are_answered_as_one_by_one(tokenizer: Tokenizer) -> None:
    model = make()
    options = AnswerOptions(top_k=3, max_seq_len=40, doc_stride=10)
    asked = [Question("q", question, context) for question in (QUESTION, "a") for context in CONTEXTS]
    together = answer_questions(model, tokenizer, asked, options, batch_size=5)
    for one, found in zip(asked, together, strict=True):
        expected = answer(model, tokenizer, one.question, one.context, top_k=3, max_seq_len=40, doc_stride=10)
        assert [span.answer for span in found] == [span.answer for span in expected]
        np.testing.assert_allclose([s.score for s in found], [s.score for s in expected], atol=1e-5)


@pytest.mark.parametrize("before", [0, 3, 30, 150])
def test_an_answer_is_found_wherever_a_long_context_has_it(tokenizer: Tokenizer, finder: Any, before: int) -> None:
    context = "日本語 years" * before + " Ishmael of the world" + " 🙂 ago" * 90
    found = answer(finder, tokenizer, QUESTION, context, max_seq_len=50, doc_stride=15)[0]
    assert found.answer == context[found.start : found.end] == " Ishmael of the world"
    assert found.score > 0.9


def test_windows_overlap_as_much_as_an_answer_needs(tokenizer: Tokenizer, finder: Any) -> None:
    """What no window sees whole is not found; it is once they share as many tokens as it has, less one."""
    context = " ago" * 30 + " Ishmael of the world" + " ago" * 30
    around = len(tokenizer.encode_with_offsets(QUESTION, "").ids) + 1
    size = around + 34 - 2 + 1  # the first window ends inside the answer
    found = [answer(finder, tokenizer, QUESTION, context, max_seq_len=size, doc_stride=stride)[0] for stride in (0, 3)]
    assert [span.answer == " Ishmael of the world" for span in found] == [False, True]


def test_an_answer_is_no_longer_than_asked_for(tokenizer: Tokenizer, finder: Any) -> None:
    context = "a Ishmael of the world"
    assert answer(finder, tokenizer, QUESTION, context, max_answer_len=4)[0].answer == " Ishmael of the world"
    assert answer(finder, tokenizer, QUESTION, context, max_answer_len=3)[0].score < 0.1


def test_the_question_is_never_the_answer(tokenizer: Tokenizer, finder: Any) -> None:
    found = answer(finder, tokenizer, "a Ishmael world", "the years ago", top_k=50)
    tokens = len(tokenizer.encode("the years ago", add_special_tokens=False))  # each as likely as another
    assert sum(span.score for span in found) == pytest.approx((tokens + 1) / (2 * tokens))  # that end after they begin


def test_an_answer_is_widened_to_whole_words(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("worldyx", add_special_tokens=False)
    assert len(ids) > 2
    model = build_by_token(ArceeForQuestionAnswering, {tokenizer.token_id("y") or 0: [1.0, 1.0]})
    context = "the worldyx ago"
    inside = answer(model, tokenizer, QUESTION, context, align_to_words=False)[0]
    whole = answer(model, tokenizer, QUESTION, context)[0]
    assert (inside.answer, whole.answer) == ("y", " worldyx")
    assert whole.score >= inside.score


def test_no_answer_counts_where_asked_for(tokenizer: Tokenizer) -> None:
    unsure = build_by_token(ArceeForQuestionAnswering, {tokenizer.bos_token_id or 0: [1.0, 1.0]})
    context = "the years ago"
    assert answer(unsure, tokenizer, QUESTION, context)[0].answer != ""
    found = answer(unsure, tokenizer, QUESTION, context, handle_impossible_answer=True, top_k=2)
    assert found[0] == AnswerSpan("", found[0].score, 0, 0) and found[0].score > 0.9 > found[1].score
    assert answer(unsure, tokenizer, QUESTION, "", handle_impossible_answer=True) == [AnswerSpan("", 1.0, 0, 0)]


def test_a_window_with_an_answer_speaks_against_none(tokenizer: Tokenizer, finder: Any) -> None:
    context = " ago" * 20 + " Ishmael of the world" + " ago" * 60
    spans = answer(
        finder, tokenizer, QUESTION, context, max_seq_len=40, doc_stride=5, top_k=5000, handle_impossible_answer=True
    )
    assert next(span.score for span in spans if span.answer == "") < 1e-6  # where all tokens are equal it is over 1e-4


def test_an_empty_context_has_no_answer(tokenizer: Tokenizer) -> None:
    assert answer(make(), tokenizer, QUESTION, "") == []


def test_spans_are_many_distinct_and_sorted(tokenizer: Tokenizer) -> None:
    found = answer(make(), tokenizer, QUESTION, TEXT, top_k=7, max_seq_len=40, doc_stride=20)
    assert len({(span.start, span.end) for span in found}) == 7
    assert [span.score for span in found] == sorted((span.score for span in found), reverse=True)
    assert found[:2] == answer(make(), tokenizer, QUESTION, TEXT, top_k=7, max_seq_len=40, doc_stride=20)[:2]


@pytest.mark.parametrize(
    ("question", "options", "words"),
    [
        ("", {}, "the question: is empty"),
        (TEXT, {"max_seq_len": 30}, "the question: leaves 0 of 30 tokens for the context; expected more than the 15"),
        (QUESTION, {"max_seq_len": 30, "doc_stride": 25}, "leaves .* of 30 tokens"),
        (QUESTION, {"max_seq_len": 257}, "max_seq_len is 257; expected 1 to 256"),
        (QUESTION, {"top_k": 0}, "top_k is 0"),
        (QUESTION, {"max_answer_len": 0}, "max_answer_len is 0"),
        (QUESTION, {"doc_stride": -1}, "doc_stride is -1"),
        (QUESTION, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(tokenizer: Tokenizer, question: str, options: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        answer(make(), tokenizer, question, TEXT, **options)


def test_another_model_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match="is of type ArceeForCausalLM; expected ArceeForQuestionAnswering"):
        answer(build(), tokenizer, QUESTION, TEXT)
