"""What becomes of a text before it is measured with, and which texts are refused."""

import os

import mlx.core as mx
import numpy as np
import pytest
import tokenizers

from arcee_mlx.checkpoint.tokenizer import read_tokenizer
from arcee_mlx.errors import InputError
from arcee_mlx.measure.text import cut_windows, read_text, read_windows

from conftest import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return read_tokenizer(checkpoint)


TEXT = "Some years ago, never mind how long precisely. " * 20


def test_windows_are_the_texts_tokens_in_order_and_equally_long(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    windows = read_windows(tokenizer, TEXT, window_tokens=32, vocab_size=400)
    assert windows.shape == (len(ids) // 32, 32)
    assert windows.reshape(-1).tolist() == ids[: windows.size]


def test_few_windows_are_spread_over_the_whole_text(tokenizer):
    every = read_windows(tokenizer, TEXT, window_tokens=16, vocab_size=400)
    some = read_windows(tokenizer, TEXT, window_tokens=16, max_windows=3, vocab_size=400)
    count = every.shape[0]
    assert mx.array_equal(some, every[mx.array([0, count // 3, 2 * count // 3])]).item()
    more = read_windows(tokenizer, TEXT, window_tokens=16, max_windows=count + 1, vocab_size=400)
    assert mx.array_equal(more, every).item()


def test_a_text_shorter_than_a_window_is_one_window(tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert read_windows(tokenizer, TEXT, window_tokens=10**6, vocab_size=400).tolist() == [ids]


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "0 tokens; expected at least 16"),
        ("Some years", {}, "expected at least 16"),
        (TEXT, {"window_tokens": 1}, "window_tokens is 1"),
        (TEXT, {"max_windows": 0}, "max_windows 0"),
        (TEXT, {"vocab_size": 40}, "expected ids from 0 to 39"),
    ],
)
def test_what_gives_no_windows_is_refused(tokenizer, text, options, words):
    with pytest.raises(InputError, match=words):
        read_windows(tokenizer, text, **({"window_tokens": 32, "vocab_size": 400} | options))


def test_a_file_is_read_as_it_is_and_without_a_byte_order_mark(tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffGrüße,\r\n日本語".encode())
    assert read_text(tmp_path / "text.txt") == "Grüße,\r\n日本語"


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "holds no text"), (b" \n\t", "holds no text"), ("Grüße".encode("latin-1"), "is not UTF-8 at byte 2")],
)
def test_a_file_without_text_is_refused_by_name(tmp_path, content, words):
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"text.txt: {words}"):
        read_text(tmp_path / "text.txt")


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "missing.txt"):
        with pytest.raises(InputError, match="cannot be read"):
            read_text(tmp_path / name)


def bare(tmp_path):
    """The same tokenizer, which puts nothing in front of a text."""
    write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    return read_tokenizer(tmp_path)


@pytest.mark.parametrize("stride", [None, 1, 5, 15, 16])
@pytest.mark.parametrize("length", [17, 1000])
@pytest.mark.parametrize("has_front", [True, False])
def test_overlapping_windows_predict_every_token_once_and_in_order(tokenizer, tmp_path, has_front, length, stride):
    own = tokenizer if has_front else bare(tmp_path)
    ids = own.encode(TEXT, add_special_tokens=False)
    found = cut_windows(own, TEXT, window_tokens=length, stride=stride, vocab_size=400)
    rows = np.array(found.ids)
    assert rows.shape[1] == min(length, len(ids) + has_front)
    assert (rows[:, 0] == 0).all() == has_front
    assert not found.scored[:, 0].any() and found.scored.any(axis=1).all()
    assert rows[found.scored].tolist() == ids[0 if has_front else 1 :]
    assert found.tokens == len(ids) - (not has_front)
    for row in rows:  # each is a piece of the text
        piece = row[has_front:].tolist()
        assert any(ids[i : i + len(piece)] == piece for i in range(len(ids)))
    assert rows[-1, -1] == ids[-1]
    assert found.scored[1:].sum(axis=1).max(initial=0) <= (stride or length - 1)


def test_predicted_tokens_stand_for_all_bytes_of_the_text(tokenizer, tmp_path):
    text = "Grüße, 日本語 🙂 " * 9
    found = cut_windows(tokenizer, text, window_tokens=20, vocab_size=400)
    assert found.text_bytes == len(text.encode())
    own = bare(tmp_path)
    without = cut_windows(own, text, window_tokens=20, vocab_size=400)
    first = own.decode(own.encode(text)[:1])  # which nothing predicts
    assert 0 < len(first) < 5 and without.text_bytes == len(text.encode()) - len(first.encode())


def test_few_overlapping_windows_stand_for_their_own_bytes(tokenizer):
    every = cut_windows(tokenizer, TEXT, window_tokens=17, vocab_size=400)
    some = cut_windows(tokenizer, TEXT, window_tokens=17, max_windows=3, vocab_size=400)
    count = every.ids.shape[0]
    chosen = np.array([0, count // 3, 2 * count // 3])
    assert np.array_equal(some.ids, np.array(every.ids)[chosen])
    assert np.array_equal(some.scored, every.scored[chosen])
    words = "".join(
        tokenizer.decode(np.array(row)[mask].tolist()) for row, mask in zip(some.ids, some.scored, strict=True)
    )
    assert some.text_bytes == len(words.encode())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window_tokens": 1}, "sequence length 1,"),
        ({"stride": 0}, "stride 0"),
        ({"stride": 32}, "stride 32 .*1 to 31"),
        ({"max_windows": 0}, "0 windows"),
        ({"vocab_size": 40}, "expected ids from 0 to 39"),
    ],
)
def test_what_gives_no_overlapping_windows_is_refused(tokenizer, options, words):
    with pytest.raises(InputError, match=words):
        cut_windows(tokenizer, TEXT, **({"window_tokens": 32, "vocab_size": 400} | options))
    with pytest.raises(InputError, match="expected at least 16"):
        cut_windows(tokenizer, "Some years", window_tokens=32, vocab_size=400)
