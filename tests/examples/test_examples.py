"""The examples keep what they promise, on the demo model at small size and without a network."""

from __future__ import annotations

import csv
import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import arcee_mlx

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = [
    "asyncio_app", "batch_csv", "coming_from_transformers", "custom_sampler", "extract", "fill_form", "finetune_lora", "saved_session",
    "serve", "tool_calls",
]  # fmt: skip
if find_spec("_tkinter"):  # some builds of Python have none
    NAMES.append("desktop_window")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports an example, in an empty folder; what it starts imports the same arcee_mlx, offline."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv(
        "MLX_DISABLE_COMPILE", "1"
    )  # on the CPU backend each compiled function would start a C++ compiler
    return importlib.import_module


def test_the_two_examples_of_transformers_page_print_the_prompt_and_go_on(
    example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("coming_from_transformers")
    assert module.main([]) == 0
    by_text, by_ids = capsys.readouterr().out.split("-" * 20 + "\n")
    for shown in (by_text, by_ids):
        assert shown.startswith(module.PROMPT) and len(shown) > len(module.PROMPT) + 20
    assert "<|" not in by_ids
    tokenizer = arcee_mlx.load(arcee_mlx.DEMO_MODEL)[1]
    added = len(tokenizer.encode(by_ids.strip())) - len(tokenizer.encode(module.PROMPT))
    assert added <= 55  # 50 were; text read again may divide into a few more


def test_letters_become_records(example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    module = example("extract")
    assert module.main(["I am Ann.", "Where is my money?"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line in lines:
        record, mood = line.split("; ")
        scope = {"Complaint": module.Complaint}
        assert isinstance(eval(record, scope), module.Complaint)  # validates: the record is what the model asks for
        assert mood in module.MOODS


def test_two_tools_run_in_a_loop(example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    module = example("tool_calls")
    assert module.main([]) == 0
    said = capsys.readouterr().out
    assert said.count("  look_up(item=") == 1 and said.count("  order(item=") == len(module.orders) == 1
    ((item, count),) = module.orders
    assert f"the model was told of order: ordered, {module.PRICES[item] * count} dollars in all" in said


def test_a_call_that_is_declined_does_not_run(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("tool_calls")
    monkeypatch.setattr("builtins.input", lambda question: "n")
    module.orders.clear()
    assert module.main(["--ask", "Look it up.", "Order one."]) == 0
    assert module.orders == [] and capsys.readouterr().out.count("error: the user does not want") == 2


def test_a_form_holds_what_its_fields_allow(example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    module = example("fill_form")
    assert module.main(["The barn burnt down."]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, (field, options) in zip(lines, module.FIELDS.items(), strict=True):
        name, answer = line[:15].strip(), line[16:]
        assert name == field
        assert answer in options.choices or re.fullmatch(options.regex or "", answer)


def test_their_lines_stand_there_as_comments() -> None:
    source = (EXAMPLES / "coming_from_transformers.py").read_text(encoding="utf-8")
    lines = {line.strip().removeprefix("# ") for line in source.splitlines()}
    theirs = {
        'output = pipeline("The key innovation in Arcee is")', 'print(output[0]["generated_text"])',
        'inputs = tokenizer("The key innovation in Arcee is", return_tensors="pt")',
        "    outputs = model.generate(**inputs, max_new_tokens=50)",
        "print(tokenizer.decode(outputs[0], skip_special_tokens=True))",
    }  # fmt: skip
    assert theirs <= lines


def test_a_lora_adapter_teaches_the_phrase(example: Callable[[str], Any], capfd: pytest.CaptureFixture[str]) -> None:
    module = example("finetune_lora")
    assert module.main([]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capfd.readouterr().out)  # without mlx-lm's colours
    answers = {
        when: [re.split(r"(?<=[.?]) ", line, maxsplit=1)[1] for line in re.findall(rf"^{when}: (.*)$", shown, re.M)]
        for when in ("before", "after")
    }
    assert len(answers["before"]) == len(answers["after"]) == len(module.UNSEEN)
    assert not any(text.startswith(module.PHRASE) for text in answers["before"])
    assert all(text.startswith(module.PHRASE) for text in answers["after"])
    losses = [float(number) for number in re.findall(r"val[^\d\n]*([\d.]+)", shown)]
    assert len(losses) >= 2 and losses[-1] < losses[0]


def test_lora_takes_data_of_the_users_own(example: Callable[[str], Any], tmp_path: Path) -> None:
    module = example("finetune_lora")
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text('{"prompt": "Hello.", "completion": "Aye."}\n' * 3)
    assert module.main(["--data", str(tmp_path), "--iters", "1", "--out", "out"]) == 0
    assert [path.name for path in Path("out").iterdir()] == ["adapter"]


def test_the_server_answers_and_is_gone_after(example: Callable[[str], Any], capfd: pytest.CaptureFixture[str]) -> None:
    module = example("serve")
    assert module.main(["--max-tokens", "12"]) == 0
    shown = capfd.readouterr().out
    address, answer = re.search(r"serving at (\S+)", shown), re.search(r"answered: (\S.*)", shown)
    assert address is not None and answer is not None and shown.endswith("stopped\n")
    with pytest.raises(OSError):
        module.OPENER.open(f"{address[1]}/models", timeout=5)


def test_no_server_is_started_without_a_model(example: Callable[[str], Any], tmp_path: Path) -> None:
    with pytest.raises(arcee_mlx.ArceeError):
        example("serve").main(["--model", str(tmp_path / "no such folder")])


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_csv_is_answered_and_goes_on_where_it_was_cut(
    example: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example("batch_csv")
    arguments = ["--max-tokens", "8", "--chunk-rows", "3"]
    assert module.main(arguments) == 0
    whole = Path("runs/answers.csv")
    asked, answered = read_rows(EXAMPLES / "prompts.csv"), read_rows(whole)
    assert [row["prompt"] for row in answered] == [row["prompt"] for row in asked]
    assert all(row["answer"] for row in answered)

    calls: list[int] = []
    generate_batch = module.generate_batch
    monkeypatch.setattr(module, "generate_batch", lambda *args: calls.append(len(args[2])) or generate_batch(*args))
    assert module.main(arguments) == 0 and calls == []  # all is done
    content, cut = whole.read_bytes(), Path("cut.csv")
    for kept in (0, 9, content.index(b"Speak of") + 5, len(content) - 3):
        cut.write_bytes(content[:kept])
        if kept == 9:  # half a header is not the work of this program
            with pytest.raises(SystemExit, match="expected"):
                module.main([str(EXAMPLES / "prompts.csv"), "cut.csv", *arguments])
            assert cut.read_bytes() == content[:kept]
            continue
        assert module.main([str(EXAMPLES / "prompts.csv"), "cut.csv", *arguments]) == 0
        assert cut.read_bytes() == content
    assert calls == [3, 3, 2, 3, 3, 1]


def test_a_row_torn_inside_a_quoted_line_break_is_answered_again(example: Callable[[str], Any], tmp_path: Path) -> None:
    module = example("batch_csv")
    head = b'prompt,answer\r\none,"say ""a""\r\nb"\r\n'
    for torn in (b"", b"two", b'two,"a ""b""\r\n', b'two,"a"""', b'two,"a\r\n\r\n'):
        path = tmp_path / "torn.csv"
        path.write_bytes(head + torn)
        assert module.keep_whole_rows(path, ["prompt", "answer"]) == 1
        assert path.read_bytes() == head


def test_a_csv_without_the_column_is_refused_by_name(example: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("question\nWhy?\n")
    with pytest.raises(SystemExit, match="'question'.*--column"):
        example("batch_csv").main([str(tmp_path / "in.csv"), str(tmp_path / "out.csv")])
    assert not (tmp_path / "out.csv").exists()


def test_the_letter_is_missing_no_pair_returns_and_seeds_decide(
    example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    module = example("custom_sampler")
    assert module.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    texts = [line.split(f"{'There was once'} ...", 1)[1] for line in lines]
    assert texts[0] == texts[2] != texts[1]
    tokenizer = arcee_mlx.load(arcee_mlx.DEMO_MODEL)[1]
    for text in texts:
        assert len(text) > 60 and "e" not in text.lower()
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) > 20


def test_a_repeated_pair_is_forbidden_and_nothing_else(example: Callable[[str], Any]) -> None:
    import mlx.core as mx

    process = example("custom_sampler").without_repeated_pairs
    scores = mx.arange(6, dtype=mx.float32)[None]
    assert process(mx.array([3]), scores).tolist() == scores.tolist()
    changed = process(mx.array([3, 1, 3, 5, 3, 1, 2, 3]), scores).tolist()[0]
    assert changed == [0, -float("inf"), 2, 3, 4, -float("inf")]


def test_texts_are_streamed_at_once_and_the_cancelled_one_computes_no_further(
    example: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert example("asyncio_app").main([]) == 0
    *lines, counts = capsys.readouterr().out.splitlines()
    names = [line.split("|")[0].strip() for line in lines]
    assert names.index("sea") < max(i for i, name in enumerate(names) if name == "nation")
    assert names.index("nation") < max(i for i, name in enumerate(names) if name == "sea")
    ends = {name: line.rpartition(" [")[2] for name, line in zip(names, lines, strict=True)}
    assert ends.pop("whale") == "cancelled]" and set(ends.values()) <= {"max_tokens]", "eos]"}
    tokens, steps = map(int, re.findall(r"\d+", counts))
    assert steps < 100 < tokens  # one alone would take 800 steps to its end


def test_a_saved_session_goes_on_in_another_process_as_if_it_had_never_ended(
    example: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [sys.executable, "-W", "error", str(EXAMPLES / "saved_session.py"), "talk.safetensors"]
    first = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert example("saved_session").main(["talk.safetensors", "--say", "And the whale?"]) == 0
    second = capsys.readouterr().out
    options = arcee_mlx.GenerateOptions(max_tokens=60, seed=1)
    with arcee_mlx.Engine.load(arcee_mlx.DEMO_MODEL) as engine:
        session = engine.session(options=options)
        for text in ("Tell me about the sea.", "And the whale?"):
            for _ in session.send(text):
                pass
        said = [f"{message.role}: {message.content}" for message in session.messages]
    assert first.startswith("\n".join(said[:2])) and "\n(0 of " in first
    assert second.startswith("\n".join(said))
    there, of = map(int, re.findall(r"\d+", second.splitlines()[-1]))
    assert 70 < there < of < there + 30


def test_importing_is_cheap_and_every_example_tells_its_options(tmp_path: Path) -> None:
    program = f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import {', '.join(NAMES)}; "
    program += "assert not sys.modules.keys() & {'mlx_lm', 'transformers', 'torch', 'openai'}"
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    for arguments in (["-c", program], *([str(EXAMPLES / f"{name}.py"), "--help"] for name in NAMES)):
        done = subprocess.run(
            [sys.executable, "-W", "error", *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_every_example_is_in_the_table() -> None:
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f"{path.name}`" in table
