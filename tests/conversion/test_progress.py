"""How far a conversion is: lines of JSON that add up, a bar for a terminal and for nothing else, or no word."""

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from itertools import count, pairwise
from pathlib import Path

import pytest

from arcee_mlx import cli
from arcee_mlx.conversion import progress, quantize, run, work_folder
from arcee_mlx.conversion.progress import Bar, JsonLines, Quiet

from conftest import write_tokenizer
from conversion_data import write_source

SCRIPT = Path(__file__).parents[2] / "convert/hf_to_mlx.py"
KEYS = ["stage", "tensor", "bytes", "total_bytes", "bytes_per_s", "seconds_left"]


@pytest.fixture
def source(tmp_path, monkeypatch):
    """Its conversion takes several slices a tensor; each of them is said."""
    monkeypatch.setattr(quantize, "SLICE_BYTES", 12_000)
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 0.0)
    return write_source(tmp_path / "in", vocab_size=400)


def convert(source, *options):
    return cli.main(["convert", "--hf-path", str(source), "--mlx-path", str(source.parent / "out"), *options])


def read_lines(err):
    lines = [json.loads(line) for line in err.splitlines()]
    assert all(list(line) == KEYS for line in lines)
    for before, after in pairwise(lines):
        assert before["stage"] != after["stage"] or before["bytes"] <= after["bytes"]
    return lines


@pytest.fixture
def clock(monkeypatch):
    """A second passes at every look at it."""
    ticks = count()
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(ticks)))


def test_a_line_has_rate_and_time_left_of_this_run(clock, capsys):
    reporter = JsonLines()
    reporter.begin("convert", 1000, 400)
    reporter.advance("x", 100)
    reporter.advance("y", 500)
    reporter.end()
    reporter.end()
    lines = read_lines(capsys.readouterr().err)
    assert [tuple(line.values()) for line in lines] == [
        ("convert", None, 400, 1000, None, None),
        ("convert", "x", 500, 1000, 33, 15.0),  # the clock was looked at three times
        ("convert", "y", 1000, 1000, 120, 0.0),
        ("convert", "y", 1000, 1000, 100, 0.0),
    ]


def test_no_rate_is_said_before_time_has_passed(monkeypatch, capsys):
    monkeypatch.setattr(progress.time, "monotonic", lambda: 5.0)
    reporter = JsonLines()
    reporter.begin("convert", 1000)
    reporter.advance("x", 1000)
    reporter.end()
    assert [line["bytes_per_s"] for line in read_lines(capsys.readouterr().err)] == [None, None]


def test_lines_come_at_intervals_and_at_both_ends_of_a_stage(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_LINE_EVERY_S", 3.0)
    reporter = JsonLines()
    for stage in ("calibrate", "check"):
        reporter.begin(stage, 10)
        for _ in range(10):
            reporter.advance("x", 1)
    reporter.end()
    lines = read_lines(capsys.readouterr().err)
    assert [(line["stage"], line["bytes"]) for line in lines] == [
        (stage, done) for stage in ("calibrate", "check") for done in (0, 3, 6, 9, 10)
    ]


@pytest.mark.parametrize("options", [[], ["--layout", "by_neuron"], ["--dtype", "float16"]], ids=str)
def test_json_is_one_object_on_standard_output_and_lines_that_add_up_on_the_other(source, capsys, options):
    assert convert(source, "--json", *options) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["folder"] == str(source.parent / "out") and result["bits_per_weight"] > 4
    lines = [line for line in read_lines(err) if line["stage"] == "convert"]
    assert [line["bytes"] for line in (lines[0], lines[-1])] == [0, result["source_bytes"]]
    assert {line["total_bytes"] for line in lines} == {result["source_bytes"]}
    assert len({line["tensor"] for line in lines}) > 19 and len({line["bytes"] for line in lines}) > 40
    assert all(line["bytes_per_s"] and line["seconds_left"] >= 0 for line in lines[1:])


def test_calibration_is_a_stage_that_adds_up_too(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "SEQUENCE_LENGTH", 16)  # of the comparison that follows
    write_tokenizer(source)
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. " * 40)
    options = ["--calibrate", str(text), "--verify", str(text), "--sequence-length", "16", "--num-samples", "2"]
    assert convert(source, "--json", *options) == 0
    out, err = capsys.readouterr()
    lines = [line for line in read_lines(err) if line["stage"] == "calibrate"]
    assert (lines[0]["bytes"], lines[-1]["bytes"]) == (0, json.loads(out)["source_bytes"])


def test_a_conversion_that_goes_on_begins_above_nothing(source, capsys, monkeypatch):
    monkeypatch.setattr(work_folder, "COMMIT_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr("arcee_mlx.conversion.run.write_card", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        assert convert(source, "--quiet") == 130
    journal = source.parent / ".out.partial/journal"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:8]))  # seven tensors are finished
    capsys.readouterr()
    assert convert(source, "--json") == 0
    out, err = capsys.readouterr()
    lines = [line for line in read_lines(err) if line["stage"] == "convert"]
    total = json.loads(out)["source_bytes"]
    assert 0 < lines[0]["bytes"] < total == lines[-1]["bytes"]
    assert lines[0]["bytes_per_s"] is None


def test_quiet_prints_the_new_folder_alone(source, capsys):
    assert convert(source, "--quiet") == 0
    assert capsys.readouterr() == (f"{source.parent / 'out'}\n", "")


def test_quiet_and_json_are_not_given_together(source, capsys):
    with pytest.raises(SystemExit):
        convert(source, "--quiet", "--json")
    assert "not allowed with argument" in capsys.readouterr().err


def test_the_bar_is_silent_where_there_is_no_terminal(capsys):
    bar = Bar()
    bar.begin("convert", 100, 50)
    bar.advance("model.norm.weight", 50)
    bar.end()
    bar.end()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar_with_bytes_tensor_rate_and_time_left(source):
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    command = [sys.executable, str(SCRIPT), "--hf-path", str(source), "--mlx-path", str(source.parent / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # Linux's end of a terminal that nobody holds any more
        pass
    out, _ = process.communicate()
    os.close(ours)
    assert (process.returncode, out.decode()) == (0, f"{source.parent / 'out'}\n")
    bar = shown.decode().split("\r")
    assert any(text.startswith("convert:   0%") and "/796k [00:00<?" in text for text in bar)
    last = next(text for text in reversed(bar) if text.startswith("convert: 100%"))
    assert "B/s, " in last and "<00:00" in last and ".weight]" in last and "model." not in last


def test_all_reporters_are_told_the_same():
    for reporter in (Bar, JsonLines):
        told = {name for name in vars(reporter) if not name.startswith("_")} - {"shows_downloads"}
        assert told == {name for name in vars(Quiet) if not name.startswith("_")} - {"shows_downloads"}
