"""A fine-tuning that is stopped and gone on with ends as one that was not: the same losses and weights, to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import ArceeConfig, ArceeForCausalLM
from arcee_mlx.checkpoint.training_state import load_training_state
from arcee_mlx.lm.command import main
from arcee_mlx.lm.training import STATE_FILE
from arcee_mlx.model.relu2.down import store_by_neuron
from arcee_mlx.upstream import mlx_lm_module

from lm_data import write_data, write_home

ITERS = 12
# Two iterations an update, four batches of the data: a stop falls inside the second epoch.
OPTIONS: dict[str, Any] = {
    "model": "base", "data": "data", "train": True, "batch_size": 2, "val_batches": 1, "max_seq_length": 32,
    "num_layers": 2, "seed": 3, "steps_per_report": 2, "steps_per_eval": 3, "save_every": 3,
    "grad_accumulation_steps": 2, "optimizer": "adamw",
    "lora_parameters": {"rank": 4, "scale": 4.0, "dropout": 0.2},
    "lr_schedule": {"name": "cosine_decay", "warmup": 2, "warmup_init": 1e-4, "arguments": [1e-2, 10]},
}  # fmt: skip


class Recorder:
    """Takes mlx-lm's reports, and interrupts as Ctrl-C does after the iteration `stop_at`."""

    def __init__(self) -> None:
        self.losses: dict[int, tuple[float, float]] = {}
        self.stop_at = 0

    def on_train_loss_report(self, info: dict[str, Any]) -> None:
        self.losses[info["iteration"]] = info["train_loss"], info["learning_rate"]
        if info["iteration"] == self.stop_at:
            raise KeyboardInterrupt

    def on_val_loss_report(self, info: dict[str, Any]) -> None:
        self.losses[-info["iteration"]] = info["val_loss"], 0.0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(mlx_lm_module("lora"), "get_reporting_callbacks", lambda *_, **__: recorder)
    return recorder


@pytest.fixture(autouse=True)
def own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A home and a working folder of a test's own, and no random state or compiled function that outlives it."""
    import datasets

    monkeypatch.setenv("HOME", str(write_home(tmp_path / "home")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", rows=8)
    state: Any = np.random.get_state()
    mx.disable_compile()  # on the CPU backend each compiled function would start a C++ compiler
    yield
    mx.enable_compile()
    np.random.set_state(state)


def write_base(kind: str = "float", *, seed: int = 1, folder: str = "base") -> None:
    config = ArceeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True, attention_dropout=0.1, dtype="float32", pad_token_id=4, eos_token_id=3,
    )  # fmt: skip
    model = ArceeForCausalLM.from_config(config, seed=seed)
    if kind == "by_neuron":
        store_by_neuron(model)
    if kind != "float":
        nn.quantize(model, group_size=32, bits=8)
    arcee_mlx.save_checkpoint(model, folder, arcee_mlx.load_tokenizer(arcee_mlx.DEMO_MODEL), overwrite=True)


def run(adapter: str, *arguments: str, **options: Any) -> int:
    Path("lora.yaml").write_text(json.dumps(OPTIONS | {"iters": ITERS} | options))
    np.random.seed(99)  # what ran before in the process decides nothing
    return main(["lora", "--config", "lora.yaml", "--adapter-path", adapter, *arguments])


def assert_same(one: str, other: str) -> None:
    first, second = (mx.load(f"{folder}/adapters.safetensors") for folder in (one, other))
    assert first.keys() == second.keys() and first
    assert [name for name in first if not mx.array_equal(first[name], second[name]).item()] == []


@pytest.mark.parametrize(
    ("base", "tuned", "optimizer"),
    [
        ("float", "lora", "adamw"),
        ("float", "dora", "adam"),
        ("float", "full", "muon"),
        ("float", "lora", "adafactor"),
        ("standard", "lora", "adamw"),
        ("standard", "dora", "sgd"),
        ("by_neuron", "lora", "adamw"),
    ],
)
def test_a_training_gone_on_with_ends_as_one_never_stopped(
    recorder: Recorder, base: str, tuned: str, optimizer: str
) -> None:
    write_base(base)
    options = {"fine_tune_type": tuned, "optimizer": optimizer}
    assert run("straight", **options) == 0
    straight, recorder.losses = recorder.losses, {}
    recorder.stop_at = 10  # saved at 4 and 6; due at 9, but in the middle of an update
    assert run("stopped", **options) == 130
    recorder.stop_at = 0
    assert run("stopped", "--resume", **options) == 0
    assert recorder.losses == straight
    assert len({loss for loss, _ in straight.values()}) > ITERS // 2  # it learns, and each is of its own
    assert_same("straight", "stopped")


def test_it_goes_on_beyond_the_end_with_another_way_of_saving_and_validating(recorder: Recorder) -> None:
    write_base()
    assert run("straight") == 0
    recorder.losses = {}
    for iters in (2, 8):
        assert run("longer", *(["--resume"] if iters > 2 else []), iters=iters, steps_per_eval=1, save_every=50) == 0
    assert run("longer", "--resume", steps_per_report=4) == 0
    assert_same("straight", "longer")
    assert {8, 12} <= recorder.losses.keys() and 10 not in recorder.losses
    assert sorted(path.name for path in Path("straight").glob("0*")) == [
        f"{i:07d}_adapters.safetensors" for i in (3, 6, 9, 12)
    ]


def test_the_iterations_are_counted_from_the_first_beginning(recorder: Recorder) -> None:
    write_base()
    assert run("adapter", iters=4) == 0
    Path("adapter/0000003_adapters.safetensors").unlink()
    assert run("adapter", "--resume") == 0
    assert sorted(path.name for path in Path("adapter").glob("0*")) == [
        f"{i:07d}_adapters.safetensors" for i in (6, 9, 12)
    ]
    assert "resume" not in json.loads(Path("adapter/adapter_config.json").read_text())


def test_the_order_of_batches_is_mlx_lms_own_until_it_validates(recorder: Recorder) -> None:
    write_base()
    assert run("ours", iters=4) == 0
    Path("theirs.yaml").write_text(json.dumps(OPTIONS | {"iters": 4, "adapter_path": "theirs"}))
    lora = mlx_lm_module("lora")
    assert lora.train is mlx_lm_module("tuner.trainer").train  # put back
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["lora", "--config", "theirs.yaml"])
        lora.main()
    assert_same("ours", "theirs")


@pytest.fixture
def stopped(recorder: Recorder) -> Path:
    write_base()
    assert run("adapter", iters=4) == 0
    return Path("adapter") / STATE_FILE


def assert_refused(capsys: pytest.CaptureFixture[str], *expected: str, **options: Any) -> None:
    capsys.readouterr()
    assert run("adapter", "--resume", **options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(text in error for text in expected), error


def test_another_training_is_refused_by_the_name_of_what_differs(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stopped.read_bytes()
    assert_refused(capsys, "batch_size is 2; expected 1", batch_size=1)
    assert_refused(capsys, "optimizer is 'adamw'; expected 'adam'", optimizer="adam")
    assert_refused(capsys, "lora_parameters is", lora_parameters={"rank": 4, "scale": 4.0, "dropout": 0.1})
    assert_refused(capsys, "iters is 2; expected 4 at least", iters=2)
    Path("data/train.jsonl").write_text(Path("data/train.jsonl").read_text().replace("train 3", "train 9"))
    assert_refused(capsys, "data_sha256 is")
    shutil.rmtree("data")
    write_data(Path("data"), rows=8)
    write_base(seed=2)
    assert_refused(capsys, "other weights beside the trained ones")
    assert stopped.read_bytes() == before


def test_damage_and_foreign_files_are_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = stopped.read_bytes()
    for place in (0, 20, 60, 200, len(whole) // 2, len(whole) - 1):
        stopped.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert_refused(capsys, STATE_FILE, "damaged")
    stopped.write_bytes(whole[:-10])
    assert_refused(capsys, STATE_FILE, "damaged")
    shutil.copy("adapter/adapters.safetensors", stopped)
    assert_refused(capsys, STATE_FILE, "is no training state's file")
    stopped.unlink()
    assert_refused(capsys, f"{STATE_FILE} does not exist")


def test_a_state_of_another_optimizer_or_model_is_refused_from_python(stopped: Path) -> None:
    model = arcee_mlx.load_model("base", adapter_path="adapter")
    settings = json.loads(mx.load(str(stopped), return_metadata=True)[1]["training state"])["settings"]
    with pytest.raises(arcee_mlx.InputError, match="'model.* is None; expected"):
        load_training_state(stopped, model, mlx_lm_module("lora").optim.AdamW(1e-2), settings=settings)


def test_resume_is_in_the_help_and_wants_a_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lora", "--model", "base", "--help"])
    assert "--resume " in capsys.readouterr().out
    assert run("adapter", "--resume", train=False, test=True) == 2
    assert "--resume without --train" in capsys.readouterr().err
