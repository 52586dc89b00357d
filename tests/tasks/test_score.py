"""What `score` says of texts: the plain computation's numbers for each, however many go together."""

import math

import numpy as np
import pytest

from arcee_mlx import ArceeModel, score
from arcee_mlx.errors import InputError
from arcee_mlx.tasks import batches
from arcee_mlx.tasks.score import _TOKENS_TOGETHER

from conftest import TEXT, tiny_config
from task_data import ROPES, TEXTS, build, logprobs, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Puts nothing around a text."""
    return make_tokenizer(tmp_path_factory.mktemp("bare"), "$A")


@pytest.fixture(scope="module")
def model():
    return build()


def check(found, expected):
    np.testing.assert_allclose([token.logprob for token in found.tokens], expected, atol=1e-5)
    assert found.logprob == pytest.approx(expected.sum(), abs=1e-4)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_scores_are_those_of_each_text_alone(tokenizer, rope, batch_size):
    model = build(rope, max_position_embeddings=40)
    texts = [text for text in TEXTS if len(tokenizer.encode(text)) <= batches.context_tokens(model.config)]
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert min(lengths) == 1 and max(lengths) > 30
    for text, found in zip(texts, score(model, tokenizer, texts, batch_size=batch_size), strict=True):
        expected = logprobs(model, tokenizer.encode(text))
        check(found, expected)
        if text:
            assert found.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-5)


@pytest.mark.parametrize("rope", ["default", "longrope"])
@pytest.mark.parametrize("tokens_together", [1, 5])
def test_long_texts_in_parts_are_the_same(tokenizer, rope, tokens_together, monkeypatch):
    model = build(rope)
    expected = [logprobs(model, tokenizer.encode(text)) for text in TEXTS]
    monkeypatch.setattr(batches, "_TOKENS_TOGETHER", tokens_together)
    for found, each in zip(score(model, tokenizer, TEXTS), expected, strict=True):
        check(found, each)


def test_padding_and_companions_change_nothing_but_the_order_of_sums(model, tokenizer):
    alone = score(model, tokenizer, [TEXTS[3]])[0]
    beside = score(model, tokenizer, [TEXT, TEXTS[3], TEXT])[1]
    assert [token.token for token in beside.tokens] == [token.token for token in alone.tokens]
    assert beside.logprob == pytest.approx(alone.logprob, abs=1e-4)


def test_tokens_name_their_places_in_the_text(model, tokenizer):
    text = "Grüße, 🙂"
    (found,) = score(model, tokenizer, [text])
    assert [token.token for token in found.tokens] == tokenizer.encode(text)[1:]
    assert all(token.text == text[token.start : token.end] for token in found.tokens)
    assert {place for token in found.tokens for place in range(token.start, token.end)} == set(range(len(text)))


def test_a_first_token_with_nothing_before_it_has_no_score(model, bare):
    long, one, none = score(model, bare, ["Call me Ishmael.", "a", ""])
    assert long.tokens[0].logprob is None and all(token.logprob is not None for token in long.tokens[1:])
    expected = logprobs(model, bare.encode("Call me Ishmael."))
    assert long.logprob == pytest.approx(expected.sum(), abs=1e-4)
    assert long.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-5)
    assert one.tokens[0].logprob is None and (one.logprob, one.perplexity) == (0, None)
    assert (none.tokens, none.logprob, none.perplexity) == ([], 0, None)


def test_what_is_put_around_a_text_is_not_scored(model, tokenizer, tmp_path):
    around = make_tokenizer(tmp_path, "<s> $A </s>")
    for text in ("Call me Ishmael.", ""):
        assert len(around.encode(text)) == len(tokenizer.encode(text)) + 1
        assert score(model, around, [text])[0].logprob == pytest.approx(score(model, tokenizer, [text])[0].logprob)
    written = score(model, around, ["Call</s>"])[0]  # a special token in the text itself is of the text
    assert written.tokens[-1].token == 1 and written.tokens[-1].text == "</s>"


def test_logits_of_a_bounded_number_of_tokens_are_in_memory(model, tokenizer, monkeypatch):
    seen, tokens = [], []
    logits, decoder = type(model).logits, type(model.model).__call__
    monkeypatch.setattr(type(model), "logits", lambda self, h: (seen.append(h.shape[0]), logits(self, h))[1])
    monkeypatch.setattr(
        type(model.model), "__call__", lambda self, ids, *rest: (tokens.append(ids.size), decoder(self, ids, *rest))[1]
    )
    score(model, tokenizer, [TEXT] * 200, batch_size=200)
    assert max(seen) == _TOKENS_TOGETHER and len(seen) > 20
    assert 2000 < max(tokens) <= batches._TOKENS_TOGETHER


def test_too_long_a_text_is_refused_by_its_place_or_cut(model, tokenizer):
    ids = tokenizer.encode(TEXT)
    with pytest.raises(InputError, match=f"text 1: has {len(ids)} tokens; expected at most 20.*truncate"):
        score(model, tokenizer, ["a", TEXT], max_length=20)
    _, found = score(model, tokenizer, ["a", TEXT], max_length=20, truncate=True)
    assert [token.token for token in found.tokens] == ids[1:20]
    check(found, logprobs(model, ids[:20]))
    with pytest.raises(InputError, match="expected at most 256"):
        score(model, tokenizer, [TEXT * 5])
    with pytest.raises(InputError, match="has 2 tokens; expected at most 1"):
        score(model, tokenizer, ["a"], max_length=1)
    assert score(model, tokenizer, ["a"], max_length=1, truncate=True)[0].tokens == []


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ("a text", {}, "single text"),
        (["a", 3], {}, "text 1: text is of type int"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
        (["a"], {"batch_size": True}, "batch_size is True"),
        (["a"], {"max_length": 0}, "max_length is 0"),
        (["a"], {"max_length": 257}, "max_length is 257; expected 1 to 256"),
        (["a\ud800"], {}, "text 0: text has a lone surrogate"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokenizer, texts, options, words):
    with pytest.raises(InputError, match=words):
        score(model, tokenizer, texts, **options)


def test_models_that_do_not_fit_are_refused(tokenizer, model):
    with pytest.raises(InputError, match="ArceeModel; expected ArceeForCausalLM"):
        score(ArceeModel(tiny_config()), tokenizer, ["a"])
    with pytest.raises(InputError, match="text 0: the tokenized text holds .*expected ids from 0 to 39"):
        score(build(vocab_size=40), tokenizer, ["Call me"])


def test_of_no_texts_there_are_no_scores(model, tokenizer):
    assert score(model, tokenizer, []) == []
