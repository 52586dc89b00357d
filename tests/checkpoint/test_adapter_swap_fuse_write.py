"""What is done with an adapter that is on: swapped, fused into the weights, written in PEFT's form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten

import arcee_mlx
from arcee_mlx import fuse_adapter, save_checkpoint, save_peft_adapter, set_adapter
from arcee_mlx.errors import CheckpointError, InputError
from arcee_mlx.upstream import mlx_lm_module

from adapter_data import EVERYWHERE, adapted, logits, make_base, write_mlx_lm, write_peft
from conftest import flat

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
