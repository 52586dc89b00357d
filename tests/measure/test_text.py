"""What becomes of a text before it is measured with, and which texts are refused."""

import os

import mlx.core as mx
import pytest

from arcee_mlx.checkpoint.tokenizer import read_tokenizer
from arcee_mlx.errors import InputError
from arcee_mlx.measure.text import read_text, read_windows


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
