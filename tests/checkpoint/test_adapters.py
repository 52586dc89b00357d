"""Adapters: what they compute, what they leave alone, and what is said of one that does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from safetensors.numpy import load_file, save_file

import arcee_mlx
from arcee_mlx import ArceeForCausalLM, ArceeModel, fuse_adapter, save_checkpoint, save_peft_adapter, set_adapter
from arcee_mlx.cli import main
from arcee_mlx.errors import ArceeError, CheckpointError, ConfigError, InputError
from arcee_mlx.upstream import mlx_lm_module

from conftest import flat, tiny_config

IDS = mx.array([[5, 17, 300, 42, 7, 255, 8]])
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
EVERYWHERE = [*ATTENTION, "mlp.up_proj", "mlp.down_proj", "lm_head", "model.embed_tokens"]
BASES = {"float": 0, "3bit": 3, "4bit": 4, "8bit": 8}


def make_base(bits: int = 0, dtype: mx.Dtype = mx.float32, **changes: object) -> ArceeForCausalLM:
    """The same random model each time, quantized for `bits` other than 0."""
    mx.random.seed(7)
    model = ArceeForCausalLM(tiny_config(**changes))
    model.load_weights([(name, 0.3 * mx.random.normal(value.shape)) for name, value in flat(model)])
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    model.set_dtype(dtype)
    return model.eval()  # type: ignore[return-value]


def write_mlx_lm(
    folder: Path,
    *,
    kind: str = "lora",
    num_layers: int = -1,
    rank: int = 4,
    scale: float = 3.0,
    keys: list[str] | None = None,
    seed: int = 0,
    **changes: object,
) -> Path:
    """An adapter as mlx_lm.lora writes it: its own layers, trained in no way but to random numbers."""
    model = make_base(**changes)  # type: ignore[arg-type]
    lora = {"rank": rank, "scale": scale, "dropout": 0.1} | ({} if keys is None else {"keys": keys})
    mx.random.seed(100 + seed)
    model.freeze()
    if kind == "full":
        for layer in model.layers[-max(num_layers, 0) :]:
            layer.unfreeze()
    else:
        mlx_lm_module("tuner").linear_to_lora_layers(model, num_layers, lora, use_dora=kind == "dora")
    weights = {name: randomized(name, value) for name, value in tree_flatten(model.trainable_parameters())}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": None if kind == "full" else lora}
    mlx_lm_module("utils").save_config({**config, "iters": 600, "seed": 0}, folder / "adapter_config.json")
    return folder


def randomized(name: str, value: mx.array) -> mx.array:
    if name.endswith(".m"):
        return value * mx.random.uniform(0.5, 1.5, value.shape)
    return 0.1 * mx.random.normal(value.shape) + (value if "lora" not in name else 0)


PEFT_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "down_proj"]}


def write_peft(folder: Path, shapes: dict[str, tuple[int, ...]] | None = None, **config: object) -> Path:
    """An adapter in PEFT's form with random tensors; by default q_proj and down_proj of both layers."""
    q, down = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
    if shapes is None:
        shapes = {}
        for layer in (0, 1):
            shapes |= {q.format(layer) + ".lora_A.weight": (4, 64), q.format(layer) + ".lora_B.weight": (128, 4)}
            shapes |= {down.format(layer) + ".lora_A.weight": (4, 128), down.format(layer) + ".lora_B.weight": (64, 4)}
    rng = np.random.default_rng(3)
    folder.mkdir()
    tensors = {f"base_model.model.{name}": 0.1 * rng.normal(size=shape) for name, shape in shapes.items()}
    save_file({name: array.astype(np.float32) for name, array in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG | config))
    return folder


class Texts(list[list[int]]):
    """A dataset for mlx-lm's trainer, of token ids."""

    def process(self, ids: list[int]) -> tuple[list[int], int]:
        return ids, 0


def logits(model: ArceeForCausalLM) -> np.ndarray:
    return np.array(model(IDS).astype(mx.float32))


def adapted(model: nn.Module) -> list[str]:
    return sorted(path for path, module in model.named_modules() if "lora_a" in module)


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


# Hot swap


@pytest.mark.parametrize("bits", [0, 4])
def test_swapping_leaves_every_array_of_the_base_the_object_it_was(tmp_path: Path, bits: int) -> None:
    folders = [
        write_mlx_lm(tmp_path / "lora", seed=1),
        write_mlx_lm(tmp_path / "dora", kind="dora", num_layers=1, rank=2, seed=2),
        write_peft(tmp_path / "peft"),
        write_mlx_lm(tmp_path / "head", keys=["lm_head", "self_attn.q_proj"], seed=3),
        write_mlx_lm(tmp_path / "full", kind="full", num_layers=1, seed=4),
    ]
    model = make_base(bits)
    arrays = dict(flat(model))
    bare = logits(model)
    fresh = []
    for folder in folders:
        other = make_base(bits)
        set_adapter(other, folder)
        fresh.append(logits(other))
    for i in [0, 1, 2, 3, 4, 0, 4, 2, None, 3, None, None]:
        set_adapter(model, None if i is None else folders[i])
        assert np.array_equal(logits(model), bare if i is None else fresh[i])
    assert {name: id(value) for name, value in flat(model)} == {name: id(value) for name, value in arrays.items()}
    assert len({array.tobytes() for array in [bare, *fresh]}) == 6


def test_an_adapter_that_does_not_fit_leaves_the_one_that_is_on(tmp_path: Path) -> None:
    model = make_base()
    set_adapter(model, write_mlx_lm(tmp_path / "a"))
    before, layers = logits(model), adapted(model)
    with pytest.raises(CheckpointError):
        set_adapter(model, write_mlx_lm(tmp_path / "b", hidden_size=32))
    with pytest.raises(CheckpointError):
        set_adapter(model, tmp_path / "nowhere")
    assert np.array_equal(logits(model), before) and adapted(model) == layers


def test_an_adapter_outlives_its_files(tmp_path: Path) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    model, other = make_base(), make_base()
    set_adapter(other, folder)
    set_adapter(model, folder)
    expected = logits(other)
    (folder / "adapters.safetensors").write_bytes(b"a training run begins to write here")
    assert np.array_equal(logits(model), expected)


def test_random_numbers_and_mode_are_left_alone(tmp_path: Path) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    draws = []
    for put_on in (True, False):
        model = make_base()
        mx.random.seed(11)
        if put_on:
            set_adapter(model, folder)
            fuse_adapter(model)
        draws.append(mx.random.normal((3,)).tolist())
    assert draws[0] == draws[1]
    model = make_base()
    set_adapter(model, folder)
    assert not any(module.training for _, module in model.named_modules())


# Fusing


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=["float32", "bfloat16"])
def test_fused_float_weights_compute_the_same(tmp_path: Path, kind: str, dtype: mx.Dtype) -> None:
    keys = [key for key in EVERYWHERE if not (kind == "dora" and key == "model.embed_tokens")]
    model = make_base(dtype=dtype)
    set_adapter(model, write_mlx_lm(tmp_path / "a", kind=kind, keys=keys))
    before = logits(model)
    fuse_adapter(model)
    assert adapted(model) == [] and {value.dtype for _, value in flat(model)} == {dtype}
    atol = 1e-3 if dtype == mx.float32 else 0.05 * np.abs(before).max()
    np.testing.assert_allclose(logits(model), before, atol=atol)
    save_checkpoint(model, tmp_path / "fused")
    loaded = arcee_mlx.load_model(tmp_path / "fused", dtype="auto")
    assert np.array_equal(logits(loaded), logits(model))
    set_adapter(model, None)  # there is nothing to take off any more
    assert np.array_equal(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fusing_quantized_layers_is_mlx_lms(tmp_path: Path, kind: str) -> None:
    folder = write_mlx_lm(tmp_path / "a", kind=kind)
    model, whole, theirs = make_base(4), make_base(4), make_base(4)
    for other in (model, whole, theirs):
        set_adapter(other, folder)
    unfused = logits(model)
    fuse_adapter(model)
    theirs.update_modules(tree_unflatten([(n, m.fuse()) for n, m in theirs.named_modules() if hasattr(m, "fuse")]))
    assert np.array_equal(logits(model), logits(theirs))
    layer = model.layers[0].mlp.up_proj
    assert isinstance(layer, nn.QuantizedLinear) and (layer.bits, layer.group_size) == (4, 32)
    fuse_adapter(whole, dequantize=True)
    assert isinstance(whole.layers[0].mlp.up_proj, nn.Linear) and isinstance(whole.lm_head, nn.QuantizedLinear)
    np.testing.assert_allclose(logits(whole), unfused, atol=1e-3)
    for fused, name in ((model, "quantized"), (whole, "mixed")):
        save_checkpoint(fused, tmp_path / name)
        assert np.array_equal(logits(arcee_mlx.load_model(tmp_path / name)), logits(fused))


def test_an_adapter_is_not_written_into_a_checkpoint_by_accident(tmp_path: Path) -> None:
    model = make_base()
    with pytest.raises(InputError, match="no adapter"):
        fuse_adapter(model)
    set_adapter(model, write_mlx_lm(tmp_path / "a"))
    with pytest.raises(InputError, match="fuse_adapter"):
        save_checkpoint(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


# Writing PEFT's form (tests/parity loads it with peft)


@pytest.mark.parametrize("how", [{}, {"keys": EVERYWHERE, "num_layers": 1}, {"kind": "dora", "rank": 3}], ids=str)
@pytest.mark.parametrize("bits", [0, 4])
def test_what_is_written_for_peft_reads_back_the_same(tmp_path: Path, how: dict[str, Any], bits: int) -> None:
    model, other = make_base(bits), make_base(bits)
    set_adapter(model, write_mlx_lm(tmp_path / "a", **how))
    save_peft_adapter(model, tmp_path / "peft", base_model="arcee-ai/AFM-4.5B")
    assert {path.name for path in (tmp_path / "peft").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    set_adapter(other, tmp_path / "peft")
    assert np.array_equal(logits(model), logits(other))
    assert (
        json.loads((tmp_path / "peft/adapter_config.json").read_text())["base_model_name_or_path"]
        == "arcee-ai/AFM-4.5B"
    )


def test_ranks_and_scales_of_their_own_are_written_too(tmp_path: Path) -> None:
    model, other = make_base(dtype=mx.bfloat16), make_base(dtype=mx.bfloat16)
    set_adapter(model, write_mlx_lm(tmp_path / "a"))
    layer = model.layers[1].mlp.up_proj
    layer.lora_a, layer.lora_b, layer.scale = layer.lora_a[:, :3].astype(mx.bfloat16), layer.lora_b[:3], 0.7
    save_peft_adapter(model, tmp_path / "peft")
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12)
    assert config["rank_pattern"] == {"model.layers.1.mlp.up_proj": 3}
    assert math.isclose(config["alpha_pattern"]["model.layers.1.mlp.up_proj"], 2.1)
    set_adapter(other, tmp_path / "peft")
    np.testing.assert_allclose(logits(other), logits(model), atol=1e-6)


def test_a_model_that_mlx_lm_has_adapted_in_memory_is_written(tmp_path: Path) -> None:
    model = make_base()
    mlx_lm_module("tuner").linear_to_lora_layers(model, 1, {"rank": 2, "scale": 2.0, "dropout": 0.0})
    model.layers[1].self_attn.q_proj.lora_b = mx.ones((2, 128))
    save_peft_adapter(model, tmp_path / "peft")
    other = make_base()
    set_adapter(other, tmp_path / "peft")
    assert np.array_equal(logits(model), logits(other))
    set_adapter(model, None)
    assert np.array_equal(logits(model), logits(make_base()))


def test_what_peft_has_no_form_for_is_not_written(tmp_path: Path) -> None:
    model = make_base()
    with pytest.raises(InputError, match="the model has no adapter; expected one to write"):
        save_peft_adapter(model, tmp_path / "p")
    for i, (how, message) in enumerate([
        ({"kind": "full"}, "'model.layers.0.input_layernorm' as a whole"),
        ({"kind": "dora", "keys": ["model.embed_tokens", "lm_head"]}, "'model.embed_tokens', with DoRA"),
    ]):  # fmt: skip
        set_adapter(model, write_mlx_lm(tmp_path / f"a{i}", **how))  # type: ignore[arg-type]
        with pytest.raises(InputError, match=message):
            save_peft_adapter(model, tmp_path / "p")
    q = "model.layers.0.self_attn.q_proj"
    shapes = {f"{q}.lora_A.weight": (4, 64), f"{q}.lora_B.weight": (128, 4), "model.norm.weight": (64,)}
    set_adapter(model, write_peft(tmp_path / "b", shapes, target_modules=[q], modules_to_save=["model.norm"]))
    with pytest.raises(InputError, match="'model.norm' as a whole"):
        save_peft_adapter(model, tmp_path / "p")
    tied = make_base(tie_word_embeddings=True)
    set_adapter(tied, write_mlx_lm(tmp_path / "c", keys=["model.embed_tokens"], tie_word_embeddings=True))
    with pytest.raises(InputError, match="which is the head too"):
        save_peft_adapter(tied, tmp_path / "p")
    assert not (tmp_path / "p").exists()
    set_adapter(model, write_peft(tmp_path / "d"))
    with pytest.raises(InputError, match="exists already"):
        save_peft_adapter(model, tmp_path / "d")


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


# What does not fit


def change(name: str, array: np.ndarray | None, file: str = "adapters.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
        save_file(tensors, folder / file)

    return damage


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (change(f"{Q}.lora_b", None), ["adapters.safetensors", f"{Q}.lora_b", "(4, 128)"]),
        (change(f"{Q}.lora_a", np.zeros((64, 5), np.float32)), ["adapters.safetensors", f"{Q}.lora_a", "(64, 5)", "(64, 4)"]),
        (change("model.layers.7.x.lora_a", np.zeros((2, 3), np.float32)), ["model.layers.7.x.lora_a", "(2, 3)", "adapters.safetensors"]),
        (change(f"{Q}.lora_a", np.zeros((64, 4), np.uint8)), [f"{Q}.lora_a", "U8", "F32"]),
    ],
    ids=["missing", "mis-shaped", "unexpected", "integers"],
)  # fmt: skip
def test_a_mismatch_names_file_tensor_and_both_sides(
    tmp_path: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        set_adapter(make_base(), folder)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "parts"),
    [
        (f"{Q}.lora_B.weight", None, [f"{Q}.lora_B.weight", "(128, 4)"]),
        (f"{Q}.lora_A.weight", np.zeros((8, 64), np.float32), [f"{Q}.lora_A.weight", "(8, 64)", "(4, 64)"]),
        (f"{Q}.lora_B.bias", np.zeros(128, np.float32), [f"{Q}.lora_B.bias", "(128,)"]),
        ("model.embed_tokens.weight", np.zeros((402, 64), np.float32), ["model.embed_tokens.weight", "(402, 64)", "(400, 64)"]),
    ],
    ids=["missing", "mis-shaped", "unexpected", "larger vocabulary"],
)  # fmt: skip
def test_a_mismatch_of_peft_names_file_tensor_and_both_sides(
    tmp_path: Path, name: str, array: np.ndarray | None, parts: list[str]
) -> None:
    folder = write_peft(tmp_path / "a")
    change(f"base_model.model.{name}", array, "adapter_model.safetensors")(folder)
    with pytest.raises(CheckpointError) as error:
        set_adapter(make_base(), folder)
    for part in ["adapter_model.safetensors", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]"),
        ({"target_parameters": ["up_proj.weight"]}, "target_parameters is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"something_new": {"a": 1}}, "something_new is"),
        ({"bias": "some"}, "bias is 'some'; expected none, all or lora_only"),
        ({"r": 0}, "r is 0; expected a positive integer"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
        ({"use_dora": 1}, "use_dora is 1; expected true or false"),
        ({"target_modules": "(q_proj"}, "target_modules is '.q_proj'; expected a regular expression, or a list"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"target_modules": ["no_such"]}, "targets no layer of this model"),
        ({"target_modules": None}, "targets no layer of this model"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is"),
        ({"lora_dropout": 1}, "lora_dropout is 1; expected 0 up to"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "use_dora with 'model.embed_tokens'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_can_and_this_cannot_is_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = write_peft(tmp_path / "a", **config)
    with pytest.raises(ConfigError, match=message) as error:
        set_adapter(make_base(), folder)
    assert str(folder / "adapter_config.json") in str(error.value)


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head", "q_proj"]},
                                    {"modules_to_save": ["lm_head"]}, {"target_modules": r".*(_proj|head)"}], ids=str)  # fmt: skip
def test_half_of_a_tied_embedding_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_peft(tmp_path / "a", **config)
    with pytest.raises(ConfigError, match="embedding and head are one in this model"):
        set_adapter(make_base(tie_word_embeddings=True), folder)
    set_adapter(make_base(tie_word_embeddings=True), write_peft(tmp_path / "b"))
    change("base_model.model.lm_head.weight", np.zeros((400, 64), np.float32), "adapter_model.safetensors")(
        tmp_path / "b"
    )
    with pytest.raises(CheckpointError, match=r"holds 'base_model.model.lm_head.weight' of shape \(400, 64\)"):
        set_adapter(make_base(tie_word_embeddings=True), tmp_path / "b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "oft"}, "fine_tune_type is 'oft'; expected one of lora, dora, full"),
        ({"num_layers": None}, "num_layers is None; expected the number of layers"),
        ({"lora_parameters": None}, "lora_parameters is None; expected an object"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "scale is None; expected a number"),
        ({"lora_parameters": {"rank": 4.5, "scale": 8}}, "rank is 4.5; expected a positive integer"),
        ({"lora_parameters": {"rank": 4, "scale": 8, "keys": "q_proj"}}, "keys is 'q_proj'; expected a list of names"),
        ({"lora_parameters": {"rank": 4, "scale": 8, "keys": ["q_proj"]}}, "targets no layer of this model"),
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_config_of_mlx_lm_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as error:
        set_adapter(make_base(), folder)
    assert str(folder / "adapter_config.json") in str(error.value)


def test_dora_on_a_quantized_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_mlx_lm(tmp_path / "a", kind="dora", keys=["model.embed_tokens"])
    with pytest.raises(ConfigError, match="DoRA on 'model.embed_tokens', which is quantized"):
        set_adapter(make_base(4), folder)


def test_folders_that_are_no_adapters_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(ArceeError) as error:
            set_adapter(make_base(), folder)
        return str(error.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "adapter_config.json: no such file" in refused(checkpoint)
    folder = write_peft(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "holds adapter_model.bin but no adapter_model.safetensors" in refused(folder)
    (folder / "adapter_config.json").write_text('{"model_type": "arcee"}')
    assert "neither peft_type nor fine_tune_type" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read" in refused(folder)
    truncated = write_mlx_lm(tmp_path / "b")
    data = (truncated / "adapters.safetensors").read_bytes()
    (truncated / "adapters.safetensors").write_bytes(data[:-9])
    assert "adapters.safetensors: is" in refused(truncated)
