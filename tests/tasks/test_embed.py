"""What `embed` makes of texts: the plain poolings of their hidden states, however many go together."""

import numpy as np
import pytest

from arcee_mlx import ArceeModel, embed
from arcee_mlx.errors import InputError
from arcee_mlx.tasks import batches

from conftest import TEXT, flat
from task_data import ROPES, TEXTS, build, hidden_states, make_tokenizer

POOLINGS = ["mean", "last", "eos"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model():
    return build()


def pool(model, ids, pooling, normalize=True):
    """One text alone, by numpy."""
    if pooling == "eos" and ids[-1:] != [1]:
        ids = [*ids, 1]
    states = hidden_states(model, ids)
    vector = states.mean(axis=0) if pooling == "mean" else states[-1]
    return vector / np.linalg.norm(vector) if normalize else vector


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_vectors_are_those_of_each_text_alone(tokenizer, rope, pooling, batch_size):
    model = build(rope, max_position_embeddings=40)
    most = batches.context_tokens(model.config) - 1
    texts = [text for text in TEXTS if len(tokenizer.encode(text)) <= most]
    found = embed(model, tokenizer, texts, pooling, batch_size=batch_size)
    assert found.shape == (len(texts), 64) and found.dtype == np.float32
    expected = [pool(model, tokenizer.encode(text), pooling) for text in texts]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("tokens_together", [1, 7])
def test_long_texts_in_parts_are_the_same(model, tokenizer, pooling, tokens_together, monkeypatch):
    expected = [pool(model, tokenizer.encode(text), pooling, normalize=False) for text in TEXTS]
    monkeypatch.setattr(batches, "_TOKENS_TOGETHER", tokens_together)
    found = embed(model, tokenizer, TEXTS, pooling, normalize=False)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_length_is_kept_without_normalize(model, tokenizer):
    plain = embed(model, tokenizer, TEXTS, normalize=False)
    assert (np.linalg.norm(plain, axis=1) > 1.05).all()
    np.testing.assert_allclose(
        embed(model, tokenizer, TEXTS), plain / np.linalg.norm(plain, axis=1, keepdims=True), atol=1e-6
    )


def test_a_text_that_ends_already_is_not_ended_twice(model, tokenizer, tmp_path):
    ending = make_tokenizer(tmp_path, "<s> $A </s>")
    np.testing.assert_array_equal(embed(model, ending, TEXTS, "eos"), embed(model, tokenizer, TEXTS, "eos"))
    np.testing.assert_array_equal(embed(model, ending, TEXTS, "last"), embed(model, tokenizer, TEXTS, "eos"))


def test_the_decoder_alone_gives_the_same(model, tokenizer):
    decoder = ArceeModel(model.config)
    decoder.load_weights(flat(model.model))
    np.testing.assert_array_equal(embed(decoder, tokenizer, TEXTS), embed(model, tokenizer, TEXTS))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_cut_text_keeps_its_end(model, tokenizer, pooling):
    ids = tokenizer.encode(TEXT)
    found = embed(model, tokenizer, [TEXT], pooling, max_length=20, truncate=True)[0]
    kept = [*ids[:19], 1] if pooling == "eos" else ids[:20]
    np.testing.assert_allclose(found, pool(model, kept, pooling), atol=1e-6)


def test_a_text_without_a_token_is_refused_by_its_place_or_ended(model, tmp_path):
    bare = make_tokenizer(tmp_path, "$A")
    for pooling in ("mean", "last"):
        with pytest.raises(InputError, match="text 1: has no tokens"):
            embed(model, bare, ["a", ""], pooling)
    np.testing.assert_allclose(embed(model, bare, [""], "eos")[0], pool(model, [1], "eos"), atol=1e-6)


def test_a_vector_of_zeros_stays_one(tokenizer):
    model = build()
    model.model.norm.weight = model.model.norm.weight * 0
    assert (embed(model, tokenizer, ["a"]) == 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pooling": "max"}, "pooling is 'max'; expected one of mean, last, eos"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_length": 5}, "text 0: has .* expected at most 5"),
    ],
)
def test_what_cannot_be_embedded_is_refused(model, tokenizer, options, words):
    with pytest.raises(InputError, match=words):
        embed(model, tokenizer, [TEXT], **options)


def test_eos_needs_a_token_for_it(model, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "eos_token_id", None)
    with pytest.raises(InputError, match="no eos_token"):
        embed(model, tokenizer, ["a"], "eos")


def test_of_no_texts_there_are_no_vectors(model, tokenizer):
    assert embed(model, tokenizer, []).shape == (0, 64)
