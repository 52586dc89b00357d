"""`arcee-mlx bench decode` on tiny shapes: four programs on the same weights, and lines that say what was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, InputError, load_model, save_checkpoint, store_by_neuron
from arcee_mlx.bench import decode as decode_command
from arcee_mlx.bench.afm_shape import AFM_CONFIG
from arcee_mlx.bench.decode_programs import (
    BY_NEURON,
    PORT,
    SPARSE,
    STANDARD,
    Program,
    Programs,
    make_random,
    read_programs,
)
from arcee_mlx.bench.decode_results import DecodeResult, describe_decode
from arcee_mlx.bench.decode_timing import (
    _cut,
    count_zeros,
    decode,
    measure_decode,
    measure_layouts,
    set_zeros,
)
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.cli import main
from arcee_mlx.measure.decode_bytes import StepBytes, count_decode_bytes
from arcee_mlx.measure.sparsity import measure_sparsity
from arcee_mlx.model.relu2 import down
from arcee_mlx.model.relu2.down import VARIABLE

TINY = AFM_CONFIG | {
    "hidden_size": 128, "intermediate_size": 640, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
    "vocab_size": 400,
}  # fmt: skip
IDS = mx.random.randint(0, 400, (6,), key=mx.random.key(5))


def make_tiny(layers: int = 3) -> Programs:
    return make_random(ArceeConfig.from_dict(TINY | {"num_hidden_layers": layers, "mlp_bias": True}), mx.float32)


@pytest.fixture(scope="module")
def programs() -> Programs:
    """Of a tiny shape; 80 % zeros."""
    made = make_tiny()
    set_zeros(made, IDS, 0.8)
    return made


@pytest.fixture(params=["standard", "by_neuron"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


def save(source: Path, folder: Path, layout: str, *, bits: int | None = None) -> Path:
    """The tiny checkpoint again, its down projections in a layout, its weights packed or not."""
    model = load_model(source)
    if layout == "by_neuron":
        store_by_neuron(model)
    if bits is not None:
        nn.quantize(model, 32, bits)
    save_checkpoint(model, folder)
    return folder


def arrays(module: Any) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def same(a: Any, b: Any) -> bool:
    left, right = arrays(a), arrays(b)
    return left.keys() == right.keys() and all(mx.array_equal(left[key], right[key]).item() for key in left)


def test_all_four_share_every_array_but_the_down_projections(programs: Programs) -> None:
    assert [program.name for program in programs] == [SPARSE, BY_NEURON, STANDARD, PORT]
    by_neuron, standard, port = (arrays(m) for m in (programs.by_neuron, programs.standard, programs.port))
    assert standard.keys() == port.keys() and all(standard[key] is port[key] for key in standard)
    others = {key for key in by_neuron if "down_proj" not in key}
    assert others == {key for key in standard if "down_proj" not in key}
    assert all(by_neuron[key] is standard[key] for key in others)


def test_down_projections_are_rounded_from_the_same_floats(programs: Programs) -> None:
    for by_neuron, standard in zip(programs.by_neuron.layers, programs.standard.layers, strict=True):
        down, linear = by_neuron.mlp.down_proj, standard.mlp.down_proj
        rows = np.array(down.rows.unpack())
        columns = np.array(mx.dequantize(linear.weight, linear.scales, linear.biases, linear.group_size, linear.bits)).T
        assert down.bits == linear.bits == 4 and down.group_size == linear.group_size == 64
        step = max(float(down.scales.max()), float(linear.scales.max()))
        assert 0 < np.abs(rows - columns).max() < 2 * step  # of the sixteen between the least and the most
        assert mx.array_equal(down.bias, linear.bias)


def test_all_four_compute_nearly_the_same(programs: Programs) -> None:
    logits = {}
    for program in programs:
        with program.running() as model:
            logits[program.name] = model(IDS[None])
    scale = mx.abs(logits[STANDARD]).max().item()
    assert mx.abs(logits[SPARSE] - logits[BY_NEURON]).max().item() < 1e-5 * scale
    assert mx.abs(logits[STANDARD] - logits[PORT]).max().item() < 1e-4 * scale
    assert 1e-4 * scale < mx.abs(logits[STANDARD] - logits[BY_NEURON]).max().item() < 0.3 * scale


def test_random_programs_are_the_same_each_time_and_leave_the_random_state_alone() -> None:
    state = mx.random.state[0].tolist()
    assert same(make_tiny().by_neuron, make_tiny().by_neuron)
    assert mx.random.state[0].tolist() == state


def test_a_float_checkpoint_gives_the_same_programs_in_either_layout(
    checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    made = read_programs(save(checkpoint, tmp_path / "model", layout), None)
    plain = read_programs(checkpoint, None)
    assert made.form == "4 bits in groups of 64" and made.rounded_again is None
    for name in ("by_neuron", "standard", "port"):
        assert same(getattr(made, name), getattr(plain, name))


def test_a_quantized_checkpoint_keeps_what_it_has_and_says_what_was_rounded_again(
    checkpoint: Path, tmp_path: Path, layout: str
) -> None:
    folder = save(checkpoint, tmp_path / "model", layout, bits=6)
    made, stored = read_programs(folder, None), load_model(folder)
    assert made.form == "6 bits in groups of 32"
    kept, again = {"standard": (made.standard, "by neuron"), "by_neuron": (made.by_neuron, "standard")}[layout]
    assert same(kept, stored) and made.rounded_again == again
    down, linear = made.by_neuron.layers[1].mlp.down_proj, made.standard.layers[1].mlp.down_proj
    form = {"group_size": 32, "bits": 6}
    rows = down.rows.unpack()
    columns = mx.dequantize(linear.weight, linear.scales, linear.biases, **form)
    if layout == "standard":
        assert mx.array_equal(down.weight_by_neuron, mx.quantize(mx.contiguous(columns.T), **form)[0])
    else:
        assert mx.array_equal(linear.weight, mx.quantize(mx.contiguous(rows.T), **form)[0])


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95])
def test_any_share_of_zeros_is_reached_in_all_programs(share: float) -> None:
    programs = make_tiny()
    for wanted in (0.3, share):  # what was set before does not matter
        set_zeros(programs, IDS, wanted)
    zeros, inputs = count_zeros(programs, IDS)
    assert zeros == pytest.approx([share] * 3, abs=0.03) and (share or zeros != [share] * 3)
    biases = [arrays(m)["model.layers.1.mlp.up_proj.bias"] for m in (programs.by_neuron, programs.port)]
    assert mx.array_equal(*biases)
    assert [x.shape for x in inputs] == [(1, 640)] * 3


def test_zeros_are_those_that_a_sparsity_profile_finds(checkpoint: Path, tmp_path: Path) -> None:
    folder = save(checkpoint, tmp_path / "model", "by_neuron", bits=4)
    ids = mx.random.randint(0, 400, (16,), key=mx.random.key(0))
    zeros, _ = count_zeros(read_programs(folder, None), ids)
    profile = measure_sparsity(open_model(folder), ids[None])
    assert zeros == pytest.approx([float(layer.zeros.mean()) for layer in profile.layers], abs=1e-3)
    assert max(zeros) > 0.1


def test_the_environment_is_the_programs_only_while_it_runs(
    programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for before in (None, "on"):
        monkeypatch.setenv(VARIABLE, before) if before else monkeypatch.delenv(VARIABLE, raising=False)
        for program, expected in zip(programs, ("auto", "off", "off", "off"), strict=True):
            with pytest.raises(ZeroDivisionError), program.running():
                assert os.environ[VARIABLE] == expected
                raise ZeroDivisionError
            assert os.environ.get(VARIABLE) == before


def test_decoding_takes_every_token_once_into_one_cache() -> None:
    class Recorder:
        layers = [None, None]

        def __call__(self, ids: mx.array, cache: Any) -> mx.array:
            seen.append((ids.tolist(), id(cache), len(cache)))
            return mx.zeros((1, 1, 4))

    seen: list[Any] = []
    assert decode(Program("x", Recorder(), "off"), IDS) > 0
    assert [ids for ids, *_ in seen] == [[[token]] for token in IDS.tolist()]
    assert len({tuple(rest) for _, *rest in seen}) == 1 and seen[0][2] == 2


def test_every_rate_is_by_the_clock_that_was_asked_for(programs: Programs) -> None:
    ticks = iter(range(10**6))
    clock: Any = lambda: 2.0 * next(ticks)  # noqa: E731
    result = measure_decode(programs, IDS, asked=None, runs=2, clock=clock)
    assert all(rate == IDS.size / 2 for rates in result.rates.values() for rate in rates)
    assert all(seconds == 2 for each in result.down_s.values() for seconds in each)
    layouts = measure_layouts(programs, IDS, IDS, layers=1, runs=1, clock=clock)
    assert [each.prefill_rates for each in layouts.values()] == [[IDS.size / 2]] * 2


def test_bytes_are_those_of_the_checkpoint_by_neuron(checkpoint: Path, tmp_path: Path) -> None:
    folder = save(checkpoint, tmp_path / "model", "by_neuron", bits=4)
    opened = open_model(folder)
    entries = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
    expected = count_decode_bytes(opened.config, entries, context_tokens=9)
    assert read_programs(folder, None).count_bytes(9) == expected


def test_bytes_of_more_layers_are_those_of_a_deeper_shape() -> None:
    assert make_tiny(1).count_bytes(4, 5) == make_tiny(5).count_bytes(4)


def test_each_program_runs_as_often_and_memory_is_looked_at(programs: Programs) -> None:
    told: list[None] = []
    result = measure_decode(programs, IDS, asked=0.8, runs=2, on_run=lambda: told.append(None))
    assert {name: len(rates) for name, rates in result.rates.items()} == dict.fromkeys(
        (SPARSE, BY_NEURON, STANDARD, PORT), 2
    )
    assert len(told) == 8 and result.down_s.keys() == {SPARSE, BY_NEURON, STANDARD}
    assert result.step.active == pytest.approx(1 - result.mean_zeros)
    layouts = measure_layouts(programs, IDS, IDS, layers=1, runs=2)
    weights = sum(x.nbytes for x in arrays(programs.standard).values())
    for each in layouts.values():
        assert each.weights_bytes == pytest.approx(weights, rel=0.01) and len(each.prefill_rates) == 2
        assert each.decode_bytes > 0 and each.prefill_bytes > 0
    assert all(layer.mlp.act_fn is programs.standard.layers[0].mlp.act_fn for layer in programs.by_neuron.layers)


def test_a_prompt_is_read_by_the_first_layers_alone(programs: Programs) -> None:
    cut, whole = arrays(_cut(programs.by_neuron, 2)), arrays(programs.by_neuron)
    assert cut.keys() == {key for key in whole if not key.startswith("model.layers.2.")}
    assert all(cut[key] is whole[key] for key in cut)


def test_ratios_are_medians_of_sparse_over_the_others() -> None:
    step = StepBytes(tokens=1, active=0.1, dense_bytes=30, ideal_bytes=15, sparse_bytes=20)
    rates = {SPARSE: [3.0, 1.0, 90.0], BY_NEURON: [2.0, 2.0, 1.0], STANDARD: [1.0, 1.0, 1.0], PORT: [0.5, 9.0, 0.5]}
    down_s = {SPARSE: [1.0, 2.0, 2.0], BY_NEURON: [8.0, 8.0, 99.0], STANDARD: [20.0, 20.0, 20.0]}
    result = DecodeResult(asked=None, zeros=[0.8, 1.0], rates=rates, down_s=down_s, step=step)
    assert [result.ratio(name) for name in (BY_NEURON, STANDARD, PORT)] == [1.5, 3, 6]
    assert [result.down_ratio(name) for name in (BY_NEURON, STANDARD)] == [4, 10]
    assert result.mean_zeros == pytest.approx(0.9) and result.reached == 1.5 / 1.5
    lines = list(describe_decode(result))
    assert lines[0].startswith("zeros 90.0% (80.0% to 100.0% by layer)")
    assert lines[5].endswith("1.50 (dense by neuron), 3.00 (dense standard), 6.00 (plain port)")
    assert "1.50 times at most by bytes, of which 100% reached" in lines[7]


def test_the_shape_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(decode_command, "AFM_CONFIG", TINY)
    monkeypatch.setattr(down, "GATHER_WEIGHTS", 0)
    numbers, picture = tmp_path / "numbers.json", tmp_path / "ratios.png"
    arguments = ("--layers", "2", "--zeros", "0.5", "0.9", "--runs", "1", "--tokens", "2", "--prefill", "5")
    assert main(["bench", "decode", *arguments, "--json", str(numbers), "--picture", str(picture)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "2 layers of 640 neurons" in lines[1] and "float32" in lines[1] and "tokens a run: 2; wall clock" in lines[1]
    assert lines[2].endswith("gathered to decode, gathered for a prompt of 5")
    assert "With all 36 a token reads" in lines[3]
    assert sum(line.startswith("zeros ") for line in lines) == 2 and "memory, MB" in lines[-3]
    values = json.loads(numbers.read_text())
    assert [each["asked_zeros"] for each in values["decode"]] == [0.5, 0.9]
    assert [each["zeros"] for each in values["decode"]] == pytest.approx([0.5, 0.9], abs=0.03)
    assert values["machine"].keys() >= {"chip", "device", "mlx", "mlx_lm"} and values["prompt_tokens"] == 5
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_checkpoint_end_to_end(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(checkpoint, tmp_path / "model", "by_neuron", bits=4)
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    assert (
        main(
            [
                "bench",
                "decode",
                "--model",
                str(folder),
                "--runs",
                "1",
                "--tokens",
                "3",
                "--prefill",
                "12",
                "--clock",
                "cpu",
            ]
        )
        == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert "4 bits in groups of 32" in lines[1] and "by the CPU time" in lines[1]
    assert lines[2].endswith("dense for a prompt of 12")
    assert lines[3].startswith("down projections standard: unpacked")
    assert lines[4].startswith("zeros ") and "asked" not in lines[4]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--runs", "0"), "--runs is 0"),
        (("--tokens", "0"), "--tokens is 0"),
        (("--prefill", "-1"), "--prefill is -1"),
        (("--layers", "0"), "--layers is 0"),
        (("--zeros", "0.5", "1"), "--zeros holds 1.0"),
        (("--text", "x"), "--text came without --model"),
        (("--model", "x", "--zeros", "0.5"), "came with --model"),
        (("--model", "x", "--layers", "2"), "came with --model"),
        (("--dtype", "bfloat16"), "--dtype is bfloat16"),
        (("--picture", "x.pdf"), ".png"),
        (("--json", "/nonexistent/x.json"), "--json"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: tuple[str, ...], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "decode", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and what in error and len(error.splitlines()) == 1


def test_a_model_without_the_zeros_or_with_odd_sizes_is_refused() -> None:
    for change, what in (({"hidden_act": "silu"}, "hidden_act"), ({"intermediate_size": 600}, "intermediate_size")):
        with pytest.raises(InputError, match=what):
            make_random(ArceeConfig.from_dict(TINY | {"num_hidden_layers": 1, "mlp_bias": True} | change), mx.float32)
