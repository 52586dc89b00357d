"""`arcee-mlx classify`, `tag` and `answer`: a JSON object for each line, the same as in Python."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import arcee_mlx
from arcee_mlx import ArceeForQuestionAnswering, ArceeForSequenceClassification, ArceeForTokenClassification
from arcee_mlx.checkpoint.tokenizer import read_tokenizer
from arcee_mlx.cli import main
from arcee_mlx.tasks import lines

from adapter_data import write_peft
from task_data import TEXTS, build, make_tokenizer

COMMANDS = {
    "classify": ArceeForSequenceClassification,
    "tag": ArceeForTokenClassification,
    "answer": ArceeForQuestionAnswering,
}
QUESTION = "Who is it?"
LABELS = {0: "O", 1: "B-PER", 2: "I-PER"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each command."""
    found = {}
    for name, cls in COMMANDS.items():
        folder = tmp_path_factory.mktemp("tasks") / name
        arcee_mlx.save_checkpoint(build(cls=cls, **({} if name == "answer" else {"id2label": LABELS})), folder)
        make_tokenizer(folder, pair="<s> $A </s> $B")
        found[name] = folder
    return found


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return file


def load(folder: Path) -> tuple[Any, Any]:
    return arcee_mlx.load_model(folder), read_tokenizer(folder)


def printed(capsys: pytest.CaptureFixture[str]) -> list[Any]:
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


def give_stdin(monkeypatch: pytest.MonkeyPatch, *values: Any) -> None:
    content = "".join(f"{json.dumps(value)}\n" for value in values).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_lines_are_classified_as_in_python(folders: Any, texts: Path, capsys: Any) -> None:
    folder = folders["classify"]
    assert main(["classify", "--model", str(folder), str(texts)]) == 0
    expected = arcee_mlx.classify(*load(folder), TEXTS)
    assert printed(capsys) == [{"text": t} | asdict(own) for t, own in zip(TEXTS, expected, strict=True)]
    options = ["--top-k", "2", "--function-to-apply", "none", "--truncate", "--max-length", "9"]
    assert main(["classify", "--model", str(folder), *options, str(texts)]) == 0
    expected = arcee_mlx.classify(*load(folder), TEXTS, top_k=2, function_to_apply="none", truncate=True, max_length=9)
    assert printed(capsys) == [{"text": t} | asdict(own) for t, own in zip(TEXTS, expected, strict=True)]


def test_pairs_of_fields_are_classified_together(folders: Any, capsys: Any, monkeypatch: Any) -> None:
    values = [{"a": "Call me", "b": "Ishmael.", "id": 1}, {"a": "", "b": "me", "id": 2}]
    give_stdin(monkeypatch, *values)
    folder = folders["classify"]
    assert main(["classify", "--model", str(folder), "--field", "a", "--pair-field", "b"]) == 0
    expected = arcee_mlx.classify(*load(folder), [(each["a"], each["b"]) for each in values])
    assert printed(capsys) == [each | asdict(own) for each, own in zip(values, expected, strict=True)]


@pytest.mark.parametrize("aggregation", [None, "none", "first"])
def test_lines_are_tagged_as_in_python(folders: Any, texts: Path, capsys: Any, aggregation: Any) -> None:
    folder = folders["tag"]
    options = [] if aggregation is None else ["--aggregation", aggregation]
    assert main(["tag", "--model", str(folder), *options, str(texts)]) == 0
    expected = arcee_mlx.tag(*load(folder), TEXTS, aggregation or "simple")
    found = printed(capsys)
    assert [each["text"] for each in found] == TEXTS
    assert [each["entities"] for each in found] == [[asdict(entity) for entity in own] for own in expected]
    assert main(["tag", "--model", str(folder), *options, "--ignore-labels", "--", str(texts)]) == 0
    assert sum(len(each["entities"]) for each in printed(capsys)) > sum(map(len, expected))


def test_a_question_is_asked_of_every_line(folders: Any, texts: Path, capsys: Any) -> None:
    folder = folders["answer"]
    options = ["--top-k", "2", "--max-answer-len", "4", "--max-seq-len", "25", "--doc-stride", "3"]
    flags = ["--handle-impossible-answer", "--no-align-to-words"]
    assert main(["answer", "--model", str(folder), "--question", QUESTION, *options, *flags, str(texts)]) == 0
    found = printed(capsys)
    model, tokenizer = load(folder)
    for text, each in zip(TEXTS, found, strict=True):
        expected = arcee_mlx.answer(
            model, tokenizer, QUESTION, text, top_k=2, max_answer_len=4, max_seq_len=25, doc_stride=3,
            handle_impossible_answer=True, align_to_words=False,
        )  # fmt: skip
        assert [span["answer"] for span in each["answers"]] == [span.answer for span in expected]
        assert [span["score"] for span in each["answers"]] == pytest.approx([s.score for s in expected], abs=1e-5)


def test_each_line_can_have_its_own_question(folders: Any, capsys: Any, monkeypatch: Any) -> None:
    values = [{"context": "Call me Ishmael.", "question": question} for question in ("Who?", "the world")]
    give_stdin(monkeypatch, *values)
    folder = folders["answer"]
    arguments = ["--field", "context", "--question-field", "question"]
    assert main(["answer", "--model", str(folder), *arguments]) == 0
    found = printed(capsys)
    model, tokenizer = load(folder)
    for each, value in zip(found, values, strict=True):
        span = arcee_mlx.answer(model, tokenizer, value["question"], value["context"])[0]
        assert each == value | {"answers": [asdict(span) | {"score": pytest.approx(span.score, abs=1e-5)}]}


@pytest.mark.parametrize("command", COMMANDS)
def test_answers_come_in_order_before_the_input_ends(
    folders: Any, texts: Path, capsys: Any, monkeypatch: Any, command: str
) -> None:
    """Lines are read some at a time; what comes after a line that cannot be read does not take back what came before."""
    monkeypatch.setattr(lines, "_BATCHES_TOGETHER", 1)
    texts.write_bytes(texts.read_bytes() + b"\xff\n")
    more = ["--question", QUESTION] if command == "answer" else []
    assert main([command, "--model", str(folders[command]), "--batch-size", "3", *more, str(texts)]) == 2
    captured = capsys.readouterr()
    assert [json.loads(line)["text"] for line in captured.out.splitlines()] == TEXTS
    assert f"line {len(TEXTS) + 1}: is not UTF-8" in captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_checkpoint_without_the_head_is_refused(folders: Any, texts: Path, capsys: Any, command: str) -> None:
    more = ["--question", QUESTION] if command == "answer" else []
    other = folders["tag" if command == "classify" else "classify"]
    assert main([command, "--model", str(other), *more, str(texts)]) == 2
    assert f"expected {COMMANDS[command].__name__}, whose head is trained" in capsys.readouterr().err
    assert main([command, *more, str(texts)]) == 2
    assert "no --model was given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("classify", ["--top-k", "0"], "top_k is 0"),
        ("classify", ["--pair-field", "b"], "--pair-field without --field"),
        ("classify", ["--max-length", "3"], "line 1: has"),
        ("tag", ["--max-length", "3"], "line 1: has"),
        ("answer", [], "expected either --question, for all texts, or --question-field"),
        ("answer", ["--question", "a", "--question-field", "b"], "expected either --question"),
        ("answer", ["--question-field", "b"], "--question-field without --field"),
        ("answer", ["--question", "a", "--top-k", "0"], "top_k is 0"),
        ("answer", ["--question", ""], "line 1: is empty; expected a question"),
    ],
)
def test_what_cannot_be_is_refused(
    folders: Any, texts: Path, capsys: Any, command: str, options: list[str], words: str
) -> None:
    assert main([command, "--model", str(folders[command]), *options, str(texts)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""


def test_a_line_without_the_second_field_is_named(folders: Any, capsys: Any, monkeypatch: Any) -> None:
    give_stdin(monkeypatch, {"a": "me", "b": 1})
    assert main(["classify", "--model", str(folders["classify"]), "--field", "a", "--pair-field", "b"]) == 2
    assert "standard input, line 1: expected a text in 'b', too" in capsys.readouterr().err


def test_an_adapter_brings_the_head_to_a_base(
    folders: Any, texts: Path, tmp_path: Path, capsys: Any, caplog: Any
) -> None:
    base = tmp_path / "base"
    arcee_mlx.save_checkpoint(build(id2label=LABELS), base)
    make_tokenizer(base)
    q = "model.layers.0.self_attn.q_proj"
    shapes = {f"{q}.lora_A.weight": (4, 64), f"{q}.lora_B.weight": (128, 4), "score.weight": (3, 64)}
    adapter = write_peft(tmp_path / "adapter", shapes, target_modules=[q], modules_to_save=["score"])
    assert main(["classify", "--model", str(base), "--adapter-path", str(adapter), str(texts)]) == 0
    model = arcee_mlx.load_model(base, ArceeForSequenceClassification, adapter_path=adapter)
    captured = capsys.readouterr()
    assert caplog.records == []  # the head is not "new, at random"
    expected = arcee_mlx.classify(model, read_tokenizer(base), TEXTS)
    assert expected != arcee_mlx.classify(
        arcee_mlx.load_model(base, ArceeForSequenceClassification), read_tokenizer(base), TEXTS
    )
    assert "score.weight: new, at random" in caplog.text
    assert [json.loads(line)["scores"] for line in captured.out.splitlines()] == [
        asdict(own)["scores"] for own in expected
    ]
