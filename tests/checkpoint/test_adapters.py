"""Adapters: what they compute, and that loading and the command line put them on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from safetensors.numpy import load_file

import arcee_mlx
from arcee_mlx import ArceeModel, set_adapter
from arcee_mlx.cli import main
from arcee_mlx.errors import CheckpointError
from arcee_mlx.upstream import mlx_lm_module

from adapter_data import EVERYWHERE, IDS, adapted, logits, make_base, write_mlx_lm, write_peft

BASES = {"float": 0, "3bit": 3, "4bit": 4, "8bit": 8}


class Texts(list[list[int]]):
    """A dataset for mlx-lm's trainer, of token ids."""

    def process(self, ids: list[int]) -> tuple[list[int], int]:
        return ids, 0


def dense(layer: Any) -> np.ndarray:
    """A layer's weights in float64, dequantized by MLX."""
    weight = layer.weight
    if "scales" in layer:
        weight = mx.dequantize(weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode=layer.mode)
    return np.array(weight.astype(mx.float32)).astype(np.float64)


# What is computed


@pytest.mark.parametrize("bits", BASES.values(), ids=BASES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_each_layer_adds_its_scaled_update(tmp_path: Path, kind: str, bits: int) -> None:
    keys = [key for key in EVERYWHERE if not (kind == "dora" and key == "model.embed_tokens")]
    # mlx-lm's own DoRA miscounts the inputs of a 3-bit layer; trained on a float base the adapter is as good
    folder = write_mlx_lm(tmp_path / "a", kind=kind, keys=keys, scale=1.7)
    stored = {name: array.astype(np.float64) for name, array in load_file(folder / "adapters.safetensors").items()}
    base, model = make_base(bits), make_base(bits)
    set_adapter(model, folder)
    layers, base_layers = dict(model.named_modules()), dict(base.named_modules())
    assert len(adapted(model)) == 12 + len([key for key in keys if "model" in key or "head" in key])
    for path in adapted(model):
        a, b, weight = stored[f"{path}.lora_a"], stored[f"{path}.lora_b"], dense(base_layers[path])
        if path == "model.embed_tokens":
            got, want = layers[path](IDS[0]), (weight + 1.7 * a @ b)[np.array(IDS[0])]
        else:
            x = np.random.default_rng(1).normal(size=(5, a.shape[0])).astype(np.float32)
            merged = weight.T + 1.7 * a @ b
            if kind == "dora":
                merged *= stored[f"{path}.m"] / np.linalg.norm(merged, axis=0)
            got, want = layers[path](mx.array(x)), x @ merged
        np.testing.assert_allclose(np.array(got), want, atol=2e-4, err_msg=path)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_layers": 1},
        {"num_layers": 0},
        {"keys": EVERYWHERE},
        {"keys": ["self_attn.v_proj"], "num_layers": 1},
        {"keys": ["model.layers.0.mlp.up_proj"]},
        {"kind": "dora"},
        {"kind": "dora", "keys": EVERYWHERE},
        {"kind": "full"},
        {"kind": "full", "num_layers": 1},
        {"bits": 4},
        {"bits": 4, "kind": "dora", "num_layers": 1},
        {"bits": 8, "keys": EVERYWHERE},
        {"tie_word_embeddings": True, "keys": ["model.embed_tokens"]},
        {"tie_word_embeddings": True, "keys": ["model.embed_tokens"], "kind": "dora"},
        {"attention_bias": True, "mlp_bias": True, "kind": "dora"},
    ],
    ids=str,
)
def test_an_adapter_of_mlx_lm_computes_what_mlx_lm_computes(tmp_path: Path, how: dict[str, Any]) -> None:
    folder = write_mlx_lm(tmp_path / "a", **how)
    base = {key: value for key, value in how.items() if key not in ("kind", "keys", "num_layers")}
    theirs = mlx_lm_module("tuner.utils").load_adapters(make_base(**base), str(folder)).eval()
    mine = make_base(**base)
    set_adapter(mine, folder)
    assert adapted(mine) == adapted(theirs)
    assert np.array_equal(logits(mine), logits(theirs))
    assert np.abs(logits(mine) - logits(make_base(**base))).max() > 0.01


def test_a_full_fine_tune_replaces_quantized_layers_by_float_ones(tmp_path: Path) -> None:
    folder = write_mlx_lm(tmp_path / "a", kind="full", num_layers=1)
    model, tuned = make_base(4), make_base()
    set_adapter(model, folder)
    set_adapter(tuned, folder)
    nn.quantize(
        tuned,
        group_size=32,
        bits=4,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and "layers.1" not in path,
    )
    assert np.array_equal(logits(model), logits(tuned))


@pytest.mark.parametrize(
    ("config", "paths", "scale"),
    [
        ({}, "01 q_proj down_proj", 3.0),
        ({"use_rslora": True}, "01 q_proj down_proj", 6.0),
        ({"lora_alpha": 2.5}, "01 q_proj down_proj", 0.625),
        ({"target_modules": r"model\.layers\.1\..*(q|down)_proj"}, "1 q_proj down_proj", 3.0),
        ({"layers_to_transform": 1}, "1 q_proj down_proj", 3.0),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, "0 q_proj down_proj", 3.0),
        ({"layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, "0 q_proj down_proj", 3.0),
        ({"exclude_modules": ["mlp.down_proj"]}, "01 q_proj", 3.0),
        ({"exclude_modules": r".*\.q_proj"}, "01 down_proj", 3.0),
        ({"target_modules": ["model.layers.1.self_attn.q_proj"], "layers_to_transform": 0}, "1 q_proj", 3.0),
        ({"target_modules": "all-linear", "exclude_modules": ["k_proj", "v_proj", "o_proj", "up_proj"]},
         "01 q_proj down_proj", 3.0),
        ({"r": 8, "rank_pattern": {"q_proj": 4, "layers.0.mlp.down_proj": 4, r".*1\.mlp.*": 4}},
         "01 q_proj down_proj", 3.0),
        ({"r": 8, "rank_pattern": {"_proj": 9, ".*_proj": 4}, "alpha_pattern": {"q_proj": 12, "down_proj": 12},
          "lora_alpha": 1}, "01 q_proj down_proj", 3.0),
    ],
    ids=str,
)  # fmt: skip
def test_peft_config_says_which_layers_and_how_strongly(
    tmp_path: Path, config: dict[str, Any], paths: str, scale: float
) -> None:
    layers, *names = paths.split()
    parts = {"q_proj": ("self_attn.q_proj", 64, 128), "down_proj": ("mlp.down_proj", 128, 64)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        for part, inputs, outputs in (parts[name] for name in names):
            shapes[f"model.layers.{layer}.{part}.lora_A.weight"] = (4, inputs)
            shapes[f"model.layers.{layer}.{part}.lora_B.weight"] = (outputs, 4)
    folder = write_peft(tmp_path / "a", shapes, **config)
    stored = load_file(folder / "adapter_model.safetensors")
    model = make_base()
    set_adapter(model, folder)
    assert {f"{path}.lora_A.weight" for path in adapted(model)} == {name for name in shapes if "lora_A" in name}
    for path in adapted(model):
        layer = dict(model.named_modules())[path]
        a, b = (stored[f"base_model.model.{path}.lora_{name}.weight"] for name in "AB")
        x = np.random.default_rng(1).normal(size=(5, a.shape[1])).astype(np.float32)
        want = x @ (dense(layer.linear) + scale * b.astype(np.float64) @ a).T
        np.testing.assert_allclose(np.array(layer(mx.array(x))), want, atol=2e-4, err_msg=path)


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_what_mlx_lms_trainer_leaves_is_the_model_it_trained(tmp_path: Path, kind: str) -> None:
    lora = mlx_lm_module("lora")
    options = lora.CONFIG_DEFAULTS | {
        "fine_tune_type": kind,
        "num_layers": 1,
        "adapter_path": str(tmp_path),
        "iters": 3,
    }
    options |= {
        "batch_size": 2,
        "learning_rate": 0.01,
        "val_batches": 1,
        "lora_parameters": {"rank": 4, "dropout": 0.0, "scale": 8.0},
    }
    trained, model = make_base(), make_base()
    texts = Texts([[0, *range(5, 25)], [0, *range(100, 130)]])
    mx.disable_compile()  # which takes ten seconds of a C++ compiler's time on Linux
    try:
        lora.train_model(SimpleNamespace(**options), trained, texts, texts)
    finally:
        mx.enable_compile()
    set_adapter(model, tmp_path)
    np.testing.assert_allclose(logits(model), logits(trained.eval()), atol=1e-5)
    assert np.abs(logits(model) - logits(make_base())).max() > 0.01


@pytest.mark.parametrize("bits", [0, 4])
def test_whole_weights_of_peft_stand_in_for_the_base(tmp_path: Path, bits: int) -> None:
    shapes = {
        "lm_head.weight": (400, 64),
        "model.embed_tokens.weight": (400, 64),
        "model.layers.1.mlp.up_proj.weight": (128, 64),
        "model.layers.0.input_layernorm.weight": (64,),
        "model.layers.1.input_layernorm.weight": (64,),
        "model.layers.0.self_attn.q_proj.lora_A.weight": (4, 64),
        "model.layers.0.self_attn.q_proj.lora_B.weight": (128, 4),
        "model.layers.0.self_attn.q_proj.base_layer.bias": (128,),
        "model.layers.1.self_attn.v_proj.bias": (64,),
    }
    for name, layer, rows in [("q_proj", 1, 128), ("k_proj", 0, 64), ("k_proj", 1, 64), ("v_proj", 0, 64),
                              ("o_proj", 0, 64), ("o_proj", 1, 64)]:  # fmt: skip
        shapes[f"model.layers.{layer}.self_attn.{name}.bias"] = (rows,)
    folder = write_peft(
        tmp_path / "a", shapes, bias="all", target_modules=["model.layers.0.self_attn.q_proj"],
        modules_to_save=["embed_tokens", "lm_head", "input_layernorm", "layers.1.mlp.up_proj", "score"],
    )  # fmt: skip
    stored = {
        name.removeprefix("base_model.model."): mx.array(array)
        for name, array in load_file(folder / "adapter_model.safetensors").items()
    }
    model, by_hand = make_base(bits, attention_bias=True), make_base(bits, attention_bias=True)
    set_adapter(model, folder)
    modules = dict(by_hand.named_modules())
    for name, array in stored.items():
        if "lora" in name:
            continue
        path, _, part = name.replace(".base_layer", "").rpartition(".")
        if part == "weight" and bits and "norm" not in path:
            own = nn.Embedding(1, 1) if "embed" in path else nn.Linear(1, 1, bias=False)
            own.weight = array
            parent = modules[path.rpartition(".")[0]]
            parent[path.rpartition(".")[2]] = own
        else:
            modules[path][part] = array
    q = "model.layers.0.self_attn.q_proj"
    set_adapter(
        by_hand,
        write_peft(tmp_path / "b", {f"{q}.lora_A.weight": (4, 64), f"{q}.lora_B.weight": (128, 4)}, target_modules=[q]),
    )
    wrapped = dict(by_hand.named_modules())[q]
    wrapped.lora_a, wrapped.lora_b = stored[f"{q}.lora_A.weight"].T, stored[f"{q}.lora_B.weight"].T
    assert np.array_equal(logits(model), logits(by_hand))
    assert np.abs(logits(model) - logits(make_base(bits, attention_bias=True))).max() > 0.1


def test_a_targeted_embedding_and_head_may_come_with_their_base(tmp_path: Path) -> None:
    shapes = {
        "lm_head.base_layer.weight": (400, 64),
        "lm_head.lora_A.weight": (4, 64),
        "lm_head.lora_B.weight": (400, 4),
        "model.embed_tokens.base_layer.weight": (400, 64),
        "model.embed_tokens.lora_embedding_A": (4, 400),
        "model.embed_tokens.lora_embedding_B": (64, 4),
    }
    folder = write_peft(tmp_path / "a", shapes, target_modules=["lm_head", "embed_tokens"])
    stored = load_file(folder / "adapter_model.safetensors")
    model = make_base()
    before = logits(model)
    set_adapter(model, folder)
    embedded = (
        stored["base_model.model.model.embed_tokens.base_layer.weight"]
        + 3.0
        * (
            stored["base_model.model.model.embed_tokens.lora_embedding_B"]
            @ stored["base_model.model.model.embed_tokens.lora_embedding_A"]
        ).T
    )
    np.testing.assert_allclose(np.array(model.model.embed_tokens(IDS[0])), embedded[np.array(IDS[0])], atol=1e-5)
    assert np.array_equal(np.array(model.lm_head.linear.weight), stored["base_model.model.lm_head.base_layer.weight"])
    set_adapter(model, None)
    assert np.array_equal(logits(model), before)


# Loading and the command line


def test_load_and_load_model_put_it_on(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    model = arcee_mlx.load_model(checkpoint)
    set_adapter(model, folder)
    for other in (
        arcee_mlx.load(checkpoint, adapter_path=folder)[0],
        arcee_mlx.load_model(checkpoint, adapter_path=str(folder)),
    ):
        assert np.array_equal(logits(other), logits(model))
    decoder = arcee_mlx.load_model(checkpoint, ArceeModel, adapter_path=folder)
    assert np.array_equal(np.array(decoder(IDS)), np.array(model.model(IDS)))
    set_adapter(decoder, None)
    assert np.array_equal(np.array(decoder(IDS)), np.array(arcee_mlx.load_model(checkpoint, ArceeModel)(IDS)))
    with pytest.raises(CheckpointError, match=r"lm_head\.lora_a"):
        set_adapter(decoder, write_mlx_lm(tmp_path / "b", keys=["lm_head", "mlp.up_proj"]))


def test_the_command_line_puts_it_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_mlx_lm(tmp_path / "a", scale=20.0)
    arguments = [
        "generate",
        "--model",
        str(checkpoint),
        "--prompt",
        "Call me",
        "--max-tokens",
        "6",
        "--temp",
        "0",
        "--quiet",
    ]
    texts = []
    for extra in ([], ["--adapter-path", str(folder)]):
        assert main([*arguments, *extra]) == 0
        texts.append(capsys.readouterr().out)
    model, tokenizer = arcee_mlx.load(checkpoint, adapter_path=folder)
    options = arcee_mlx.GenerateOptions(max_tokens=6, temp=0)
    message = [{"role": "user", "content": "Call me"}]
    assert texts[1] == arcee_mlx.generate(model, tokenizer, message, options) + "\n" != texts[0]
    (folder / "adapters.safetensors").unlink()
    assert main([*arguments, "--adapter-path", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder}: has no adapters.safetensors; expected safetensors")
