"""`arcee-mlx score` and `arcee-mlx embed`: a JSON object for each line, in order, as soon as it is there."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import arcee_mlx
from arcee_mlx.cli import main
from arcee_mlx.tasks import lines

from conftest import TEXT
from task_data import TEXTS, build, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks") / "model"
    arcee_mlx.save_checkpoint(build(), folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return file


def answers(capsys):
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.fixture
def stdin(monkeypatch):
    def give(content):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def test_lines_are_scored_as_in_python(folder, texts, capsys):
    assert main(["score", "--model", str(folder), "--tokens", str(texts)]) == 0
    found = answers(capsys)
    model, tokenizer = arcee_mlx.load(folder)
    expected = arcee_mlx.score(model, tokenizer, TEXTS)
    assert [list(each) for each in found] == [["text", "logprob", "perplexity", "tokens"]] * len(TEXTS)
    for each, text, own in zip(found, TEXTS, expected, strict=True):
        assert (each["text"], each["logprob"], each["perplexity"]) == (text, own.logprob, own.perplexity)
        assert each["tokens"] == [vars(token) for token in own.tokens]


def test_without_tokens_their_number_is_told(folder, texts, capsys):
    assert main(["score", "--model", str(folder), str(texts), str(texts)]) == 0
    found = answers(capsys)
    assert list(found[0]) == ["text", "logprob", "perplexity", "token_count"]
    assert [each["text"] for each in found] == TEXTS * 2


@pytest.mark.parametrize("pooling", ["mean", "last", "eos"])
def test_lines_are_embedded_to_the_bit_as_in_python(folder, texts, capsys, pooling):
    assert main(["embed", "--model", str(folder), "--pooling", pooling, "--no-normalize", str(texts)]) == 0
    found = answers(capsys)
    expected = arcee_mlx.embed(*arcee_mlx.load(folder), TEXTS, pooling, normalize=False)
    assert np.array_equal(np.array([each["embedding"] for each in found], dtype=np.float32), expected)
    assert main(["embed", "--model", str(folder), str(texts)]) == 0
    lengths = [np.linalg.norm(each["embedding"]) for each in answers(capsys)]
    np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_json_lines_keep_what_they_hold(folder, capsys, stdin):
    stdin(b'{"id": 7, "body": "Call me", "text": [1]}\n{"body": "Gr\\u00fc\\u00dfe\\n", "id": null}\n')
    assert main(["score", "--model", str(folder), "--field", "body"]) == 0
    first, second = answers(capsys)
    assert (first["id"], first["body"], first["text"]) == (7, "Call me", [1])
    assert second["body"] == "Grüße\n" and first["logprob"] < 0 and second["logprob"] < 0


@pytest.mark.parametrize("content", [b"a\r\nb\r\n", b"\xef\xbb\xbfa\nb", b"a\nb\n"])
def test_line_ends_and_byte_order_marks_are_no_text(folder, capsys, stdin, content):
    stdin(content)
    assert main(["score", "--model", str(folder), "-"]) == 0
    assert [each["text"] for each in answers(capsys)] == ["a", "b"]


def test_of_no_lines_there_is_no_answer(folder, capsys, stdin):
    stdin(b"")
    assert main(["embed", "--model", str(folder)]) == 0
    assert answers(capsys) == []


@pytest.mark.parametrize(("batch_size", "together"), [(1, 1), (2, 2 * lines._BATCHES_TOGETHER)])
def test_answers_come_before_the_next_lines_are_read(folder, capsys, monkeypatch, batch_size, together):
    answered = []

    class Stdin:
        isatty = staticmethod(lambda: False)

        @property
        def buffer(self):
            for i in range(100):
                answered.append(len(capsys.readouterr().out.splitlines()))
                yield f"{i}\n".encode()

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert main(["score", "--quiet", "--model", str(folder), "--batch-size", str(batch_size)]) == 0
    told = [i for i, count in enumerate(answered) if count]
    assert told[0] == together and answered[together] == together


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"a\nGr\xfc\xdfe\n", [], "standard input, line 2: is not UTF-8 at byte 2"),
        (b"{}\n", ["--field", "text"], "standard input, line 1: expected a JSON object with a text in 'text'"),
        (b'{"text": 3}\n', ["--field", "text"], "a text in 'text'"),
        (b"[1]\n", ["--field", "text"], "a JSON object"),
        (b"{\n", ["--field", "text"], "standard input, line 1: is not JSON"),
        (b"[" * 100_000, ["--field", "text"], "is not JSON"),
        (b'{"text": "a", "logprob": 1}\n', ["--field", "text"], "line 1: has a field 'logprob' already"),
        (b"a\n" + TEXT.encode() + b"\n", ["--max-length", "9"], "standard input, line 2: has .* expected at most 9"),
        (b"a\n", ["--batch-size", "0"], "--batch-size is 0"),
        (b"a\n", ["missing.txt"], "missing.txt: no such file"),
        (b"a\n", ["."], "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_by_line(folder, capsys, stdin, content, options, words):
    stdin(content)
    assert main(["score", "--model", str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(words, error)


def test_a_long_line_is_cut_when_asked(folder, capsys, stdin):
    stdin(TEXT.encode() + b"\n")
    assert main(["score", "--model", str(folder), "--max-length", "9", "--truncate"]) == 0
    assert answers(capsys)[0]["token_count"] == 8


def test_a_decoder_without_a_head_embeds(tmp_path, texts, capsys):
    model = build()
    arcee_mlx.save_checkpoint(model.model, tmp_path / "decoder")
    make_tokenizer(tmp_path / "decoder")
    assert main(["embed", "--model", str(tmp_path / "decoder"), str(texts)]) == 0
    assert len(answers(capsys)) == len(TEXTS)
    assert main(["score", "--model", str(tmp_path / "decoder"), str(texts)]) == 2


def test_without_a_model_the_demo_answers_and_says_so(capsys, stdin):
    stdin(b"The sea\n")
    assert main(["embed"]) == 0
    captured = capsys.readouterr()
    assert "demo" in captured.err and len(json.loads(captured.out)["embedding"]) == 256


def test_a_reader_that_goes_away_ends_it_quietly(folder, texts):
    program = "import sys; from arcee_mlx.cli import main; sys.exit(main())"
    arguments = ["score", "--batch-size", "1", "--model", str(folder), *[str(texts)] * 200]
    root = str(Path(arcee_mlx.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root
    ) as process:
        assert json.loads(process.stdout.readline())["text"] == TEXTS[0]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
