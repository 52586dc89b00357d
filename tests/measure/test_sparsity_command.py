"""`arcee-mlx sparsity`: the table, the JSON, the picture, and what it refuses."""

import json
import sys

import pytest

from arcee_mlx.cli import main
from arcee_mlx.conversion.texts import VERIFICATION_TEXT
from arcee_mlx.measure.sparsity_command import DEFAULT_TEXT

from conftest import TEXT, write_checkpoint


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT * 4, encoding="utf-8")
    return file


@pytest.fixture
def sparsity(checkpoint, text):
    return lambda *arguments: main(
        ["sparsity", str(checkpoint), "--text", str(text), "--num-samples", "2", "--sequence-length", "16", *arguments]
    )


def test_table_and_json_say_the_same(sparsity, capsys) -> None:
    assert sparsity("--bandwidth", "100") == 0
    captured = capsys.readouterr()
    assert captured.err == "" and max(map(len, captured.out.splitlines()[1:])) <= 110
    assert sparsity("--bandwidth", "100", "--json") == 0
    values = json.loads(capsys.readouterr().out)
    table = captured.out.splitlines()
    rows = [line.split() for line in table if line.split()[:1] in (["0"], ["1"])]
    for layer, row in zip(values["layers"], rows, strict=False):
        zeros, rates = layer["zeros"], layer["firing_rates"]
        cells = [zeros["mean"], zeros["min"], zeros["max"], rates["dead"], rates["below_1_percent"], rates["always_on"]]
        cells += [rates["quantiles"]["0.5"], rates["quantiles"]["0.9"], *(layer["active"][m] for m in "248")]
        assert row == [str(layer["index"]), *(f"{share:.1%}" for share in cells)]
    steps = [line.split() for line in table[table.index("") :] if line.split()[:1] in (["1"], ["2"], ["4"], ["8"])][-4:]
    for step, row in zip(values["steps"], steps, strict=True):
        assert row[:2] == [str(step["tokens"]), f"{step['active']:.1%}"]
        assert row[4:6] == [f"{step['speedup']:.2f}", f"{step['ideal_speedup']:.2f}"]
        assert row[6:] == [f"{step[kind + '_tokens_per_s']:,.1f}" for kind in ("dense", "sparse")]
        assert step["sparse_tokens_per_s"] == pytest.approx(step["tokens"] * 1e11 / step["sparse_bytes"])
    assert f"{values['zeros']:.1%} of the neurons are zero" in table[-2]


def test_json_is_one_object_with_stable_keys(sparsity, capsys) -> None:
    assert sparsity("--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == [
        "model", "text", "context_tokens", "bandwidth_gb_per_s", "activation", "neurons", "windows", "window_tokens", "zeros",
        "layers", "steps",
    ]  # fmt: skip
    assert (values["text"], values["windows"], values["window_tokens"]) == ("text.txt", 2, 16)
    assert values["context_tokens"] == 256 and values["bandwidth_gb_per_s"] is None  # no more than the model has
    assert [list(step) for step in values["steps"]] == [
        ["tokens", "active", "dense_bytes", "ideal_bytes", "sparse_bytes", "ideal_speedup", "speedup"]
    ] * 4


def test_a_longer_context_lowers_what_zeros_can_give(sparsity, capsys) -> None:
    speedups = []
    for context in ("0", "256"):
        assert sparsity("--json", "--context", context) == 0
        speedups.append(json.loads(capsys.readouterr().out)["steps"][0]["ideal_speedup"])
    assert speedups[0] > speedups[1] > 1


def test_the_default_text_is_the_one_conversions_are_judged_on() -> None:
    assert DEFAULT_TEXT.samefile(VERIFICATION_TEXT)


def test_the_picture_is_a_png_drawn_without_pyplot(sparsity, tmp_path) -> None:
    pytest.importorskip("matplotlib")
    before = "matplotlib.pyplot" in sys.modules
    assert sparsity("--picture", str(tmp_path / "zeros.png")) == 0
    assert (tmp_path / "zeros.png").read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_missing_matplotlib_is_said_at_once(sparsity, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert sparsity("--picture", str(tmp_path / "zeros.png")) == 2
    captured = capsys.readouterr()
    assert "pip install 'arcee-mlx[plot]'" in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bandwidth", "0"), "--bandwidth is 0.0"),
        (("--bandwidth", "nan"), "--bandwidth is nan"),
        (("--context", "257"), "--context is 257; expected 0 to 256"),
        (("--sequence-length", "7"), "--sequence-length is 7; expected 8 to 256"),
        (("--num-samples", "0"), "--num-samples is 0"),
        (("--text", "/nonexistent.txt"), "/nonexistent.txt"),
    ],
)
def test_what_is_out_of_range_is_refused(sparsity, capsys, arguments, message) -> None:
    assert sparsity(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""


@pytest.mark.parametrize(
    ("name", "message"), [("zeros.svg", "expected .png"), ("none/zeros.png", "folder that exists")]
)
def test_a_picture_that_cannot_be_written_is_refused_first(sparsity, tmp_path, capsys, name, message) -> None:
    pytest.importorskip("matplotlib")
    assert sparsity("--picture", str(tmp_path / name)) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.out == ""


def test_a_model_without_zeros_is_refused_by_its_activation(tmp_path, text, capsys) -> None:
    write_checkpoint(tmp_path / "model", hidden_act="gelu")
    assert main(["sparsity", str(tmp_path / "model"), "--text", str(text)]) == 2
    assert "hidden_act is 'gelu'; expected 'relu2' or 'relu'" in capsys.readouterr().err
