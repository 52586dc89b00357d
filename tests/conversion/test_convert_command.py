"""The conversion script as a user meets it: options meant or refused by name, one line for an error, a clean stdout."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, ArceeForCausalLM, cli, load_model
from arcee_mlx.checkpoint import files
from arcee_mlx.conversion import command, work_folder
from arcee_mlx.conversion.progress import Bar

SCRIPT = Path(__file__).parents[2] / "convert/hf_to_mlx.py"
SHAPE = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    config = ArceeConfig(**SHAPE)
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(ArceeForCausalLM(config).parameters())))
    (folder / "config.json").write_text(json.dumps({"model_type": "arcee", "torch_dtype": "float32"} | SHAPE))
    return folder


def run_script(*arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command_line = [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command_line, cwd=cwd, env=environment, capture_output=True, text=True)


def run_here(*arguments):
    """The same command through `arcee-mlx`, in this process."""
    return cli.main(["convert", *map(str, arguments)])


def test_the_script_runs_from_any_folder_and_prints_the_new_folder_alone(source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run_script("--hf-path", "../in", "--mlx-path", "out", cwd=elsewhere)
    assert (done.returncode, done.stdout) == (0, f"{elsewhere / 'out'}\n"), done.stderr
    assert load_model(elsewhere / "out").config.quantization == {"group_size": 64, "bits": 4, "mode": "affine"}
    assert "bits per weight" in done.stderr and "peak memory" in done.stderr and "tokenizer.json" in done.stderr
    assert "\r" not in done.stderr  # no bar where standard error is no terminal


def test_the_default_folder_is_mlx_lms(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_here("--hf-path", source) == 0
    assert (tmp_path / "mlx_model/config.json").exists()


@pytest.mark.parametrize(
    ("options", "table", "dtype"),
    [
        ([], {"group_size": 64, "bits": 4, "mode": "affine"}, "float32"),
        (["-q"], {"group_size": 64, "bits": 4, "mode": "affine"}, "float32"),
        (["--quantize", "--q-mode", "affine"], {"group_size": 64, "bits": 4, "mode": "affine"}, "float32"),
        (["--q-bits", "8", "--q-group-size", "32"], {"group_size": 32, "bits": 8, "mode": "affine"}, "float32"),
        (["--q-mode", "mxfp4"], {"group_size": 32, "bits": 4, "mode": "mxfp4"}, "float32"),
        (["--q-mode", "nvfp4", "--q-bits", "4"], {"group_size": 16, "bits": 4, "mode": "nvfp4"}, "float32"),
        (["--q-bits", "3"], {"group_size": 64, "bits": 3, "mode": "affine"}, "float32"),
        (["--recipe", "6bit"], {"group_size": 64, "bits": 6, "mode": "affine"}, "float32"),
        (
            ["-q", "--recipe", "8bit", "--q-group-size", "32"],
            {"group_size": 32, "bits": 8, "mode": "affine"},
            "float32",
        ),
        (["--recipe", "fp16"], None, "float16"),
        (["--no-quantize", "--recipe", "fp16"], None, "float16"),
        (["--recipe", "bf16", "--dtype", "float16"], None, "float16"),
        (["--no-quantize"], None, "float32"),
        (["--no-quantize", "--dtype", "bfloat16"], None, "bfloat16"),
        (["--dtype", "float16"], {"group_size": 64, "bits": 4, "mode": "affine"}, "float16"),
    ],
)
def test_options_mean_what_they_mean_to_mlx_lm(source, tmp_path, options, table, dtype):
    assert run_here("--hf-path", source, "--mlx-path", tmp_path / "out", *options) == 0
    config = load_model(tmp_path / "out").config
    assert (config.quantization, config.dtype) == (table, dtype)


def test_force_is_needed_to_replace_a_converted_model(source, tmp_path, capsys):
    arguments = ["--hf-path", source, "--mlx-path", tmp_path / "out"]
    assert run_here(*arguments) == 0
    capsys.readouterr()
    assert run_here(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and "exists already" in err
    assert run_here(*arguments, "--force", "--q-bits", "8") == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--q-bits", "7"], "argument --q-bits: invalid choice: 7"),
        (["--q-bits", "four"], "argument --q-bits: invalid int value"),
        (["--q-group-size", "48"], "argument --q-group-size: invalid choice: 48"),
        (["--q-mode", "q4_k"], "argument --q-mode: invalid choice: 'q4_k'"),
        (["--layout", "sideways"], "argument --layout: invalid choice: 'sideways'"),
        (["--dtype", "float64"], "argument --dtype: invalid choice: 'float64'"),
        (["--quantize", "--no-quantize"], "--no-quantize: not allowed with argument -q/--quantize"),
        (["--bits", "4"], "unrecognized arguments: --bits 4"),
        (["-d"], "-d is not offered; convert the original"),
        (["--dequantize"], "--dequantize is not offered; convert the original"),
        (["--trust-remote-code"], "--trust-remote-code is not offered; code of a checkpoint is never run"),
    ],
)
def test_what_is_not_offered_is_refused_by_name_with_status_2(source, tmp_path, capsys, options, says):
    with pytest.raises(SystemExit) as stopped:
        run_here("--hf-path", source, "--mlx-path", tmp_path / "out", *options)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == ""
    assert says in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--no-quantize", "--q-bits", "8"], "--no-quantize came with --q-bits; expected one or the other"),
        (["--no-quantize", "--recipe", "4bit"], "--no-quantize came with --recipe 4bit; expected"),
        (["--no-quantize", "--q-mode", "affine", "--recipe", "4bit"], "came with --q-mode, --recipe 4bit; expected"),
        (
            ["--recipe", "bf16", "--q-bits", "8", "--q-group-size", "32"],
            "--recipe bf16 came with --q-bits, --q-group-size;",
        ),
        (["--recipe", "bf16", "-q"], "--recipe bf16 came with --quantize; expected one or the other"),
        (["--q-mode", "mxfp4", "--q-bits", "3"], "bits is 3; expected 4 in mode 'mxfp4'"),
        (["--q-group-size", "16"], "group_size is 16; expected 32, 64 or 128 in mode 'affine'"),
        (["--recipe", "mixed_3_7"], "recipe is 'mixed_3_7'; expected 2bit"),
        (["--recipe", "mine.yaml"], "mine.yaml: no such file"),
    ],
)
def test_options_that_contradict_each_other_or_mlx_are_refused_by_name(source, tmp_path, capsys, options, says):
    assert run_here("--hf-path", source, "--mlx-path", tmp_path / "out", *options) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--recipe", "--quant-predicate"])
def test_a_recipe_is_a_name_or_a_file_under_mlx_lms_option_too(source, tmp_path, option):
    (tmp_path / "mine.yaml").write_text(
        "quantization: {bits: 2}\nrules: [{tensors: ['*.q_proj'], quantization: {bits: 8}}]"
    )
    for name, bits in ((tmp_path / "mine.yaml", 8), ("mixed_2_6", 2)):
        target = tmp_path / f"out{bits}"
        assert run_here("--hf-path", source, "--mlx-path", target, option, name) == 0
        model = load_model(target)
        assert (model.layers[0].self_attn.q_proj.bits, model.layers[0].mlp.up_proj.bits) == (bits, 2)


def test_weights_that_are_not_finite_are_kept_only_when_that_is_asked_for(source, tmp_path, capsys):
    weights = dict(mx.load(str(source / "model.safetensors")))
    weights["model.norm.weight"][3] = float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    arguments = ["--hf-path", source, "--mlx-path", tmp_path / "out"]
    assert run_here(*arguments) == 2
    assert "'model.norm.weight' holds Inf or NaN in rows 3 to 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_here(*arguments, "--allow-nonfinite") == 0
    kept = load_model(tmp_path / "out").model.norm.weight
    assert mx.isnan(kept).tolist() == [i == 3 for i in range(64)]


def test_a_mistake_of_the_users_is_one_line(tmp_path):
    done = run_script("--hf-path", "./nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no such folder './nowhere'")


def interrupt(*_args, **_options):
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_ends_with_130_and_says_what_is_kept(source, tmp_path, monkeypatch, capsys):
    arguments = ["--hf-path", source, "--mlx-path", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr("arcee_mlx.conversion.run.write_card", interrupt)
        assert run_here(*arguments) == 130
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"stopped; 0\.\d MB are kept, and the same command goes on from there\ninterrupted\n", err)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", "in"]
    assert run_here(*arguments) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_ctrl_c_before_anything_is_finished_says_nothing_more_and_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("arcee_mlx.conversion.quantize.read_rows", interrupt)
    assert run_here("--hf-path", source, "--mlx-path", tmp_path / "out") == 130
    assert capsys.readouterr() == ("", "interrupted\n")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("owner", "name", "number", "says"),
    [
        (os, "pwrite", errno.ENOSPC, "No space left on device.*the same command again, which goes on from here"),
        (files, "open", errno.EIO, "are kept, and the same command goes on.*\nerror: .*in/model.*Input/output error"),
    ],
    ids=["full", "unreadable"],
)
def test_a_disk_that_fails_is_an_error_that_says_how_to_go_on(
    source, tmp_path, monkeypatch, capsys, owner, name, number, says
):
    def fail(*_args, **_options):
        raise OSError(number, os.strerror(number))

    arguments = ["--hf-path", source, "--mlx-path", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(work_folder, "COMMIT_EVERY_S", 0.0)
        patch.setattr(Bar, "advance", lambda *_: patch.setattr(owner, name, fail, raising=False))  # after one tensor
        assert run_here(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.search(says, err), err
    assert run_here(*arguments) == 0


def test_converting_imports_neither_mlx_lm_nor_transformers_nor_torch(source, tmp_path):
    code = (
        "import sys; from arcee_mlx.conversion.run import convert; convert(sys.argv[1], sys.argv[2]);"
        "print(sorted({'mlx_lm', 'transformers', 'torch'} & sys.modules.keys()))"
    )
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    arguments = [sys.executable, "-c", code, str(source), str(tmp_path / "out")]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_option_of_mlx_lm_convert_is_meant_or_refused():
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    known = {option for action in parser._actions for option in action.option_strings}
    theirs = "--hf-path --model --mlx-path -q --quantize --q-group-size --q-bits --q-mode --quant-predicate --dtype"
    assert {*theirs.split(), "--upload-repo", "-d", "--dequantize", "--trust-remote-code"} <= known
