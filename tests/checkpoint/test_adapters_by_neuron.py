"""Adapters on down projections stored by neuron: the numbers of the standard layout, or a refusal by name."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeForCausalLM, fuse_adapter, load_model, save_checkpoint, save_peft_adapter, set_adapter
from arcee_mlx.errors import ConfigError
from arcee_mlx.model.relu2.down import ByNeuron, store_by_neuron
from arcee_mlx.model.relu2.lora import LoRADownByNeuron
from arcee_mlx.upstream import mlx_lm_module

from adapter_data import adapted, logits, make_base, write_mlx_lm, write_peft


def make_turned(bits: int = 0) -> ArceeForCausalLM:
    """`make_base` with its down projections by neuron."""
    model = make_base()
    store_by_neuron(model)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    return model


def near(a: np.ndarray, b: np.ndarray, atol: float = 1e-4) -> bool:
    return np.allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("bits", [0, 8])
def test_a_full_fine_tune_of_the_standard_layout_is_turned(tmp_path: Path, bits: int) -> None:
    folder = write_mlx_lm(tmp_path / "adapter", kind="full")
    standard, turned = make_base(), make_turned(bits)
    for model in (standard, turned):
        set_adapter(model, folder)
    names = [name for name, array in tree_flatten(turned.layers[0].parameters()) if array.dtype == mx.uint32]
    assert not any("down_proj" in name for name in names)
    if not bits:  # else the embedding is not the same
        assert near(logits(turned), logits(standard))


@pytest.mark.parametrize("write", [write_peft, write_mlx_lm])
def test_an_adapter_gives_what_it_gives_on_the_standard_layout(tmp_path: Path, write) -> None:
    folder = write(tmp_path / "adapter")
    standard, turned = make_base(), make_turned()
    bare = logits(turned)
    for model in (standard, turned):
        set_adapter(model, folder)
    assert adapted(standard) == adapted(turned)
    assert isinstance(turned.layers[0].mlp.down_proj, LoRADownByNeuron)
    assert near(logits(turned), logits(standard)) and not near(logits(turned), bare, 1e-2)
    set_adapter(turned, None)
    assert np.array_equal(logits(turned), bare)


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("bits", [0, 8])
def test_a_fused_adapter_is_in_the_rows(tmp_path: Path, bits: int, dequantize: bool) -> None:
    model = make_turned(bits)
    set_adapter(model, write_peft(tmp_path / "adapter"))
    want = logits(model)
    fuse_adapter(model, dequantize=dequantize)
    down = model.layers[0].mlp.down_proj
    assert isinstance(down, ByNeuron) and ("scales" in down) == (bits > 0 and not dequantize) and not down.training
    assert near(logits(model), want, 1e-4 if dequantize or not bits else 0.2)


def test_what_is_written_as_peft_reads_back(tmp_path: Path) -> None:
    model = make_turned()
    set_adapter(model, write_mlx_lm(tmp_path / "adapter"))
    save_peft_adapter(model, tmp_path / "peft")
    standard = make_base()
    set_adapter(standard, tmp_path / "peft")
    assert near(logits(standard), logits(model))


@pytest.mark.parametrize("bits", [0, 8])
def test_a_whole_projection_of_peft_is_turned(tmp_path: Path, bits: int) -> None:
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    folder = write_peft(
        tmp_path / "adapter",
        dict.fromkeys(names, (64, 128)),
        target_modules=[],
        modules_to_save=["down_proj"],
    )
    standard, turned = make_base(), make_turned()
    if bits:
        for model in (standard, turned):
            nn.quantize(model, group_size=32, bits=bits)
    for model in (standard, turned):
        set_adapter(model, folder)
    assert near(logits(turned), logits(standard))


@pytest.mark.parametrize("write", [write_peft, write_mlx_lm])
def test_dora_is_refused_by_name_with_what_to_do(tmp_path: Path, write) -> None:
    options = {"use_dora": True} if write is write_peft else {"kind": "dora"}
    model = make_turned()
    with pytest.raises(ConfigError, match=r"DoRA on 'model\.layers\.\d\.mlp\.down_proj'.* --layout standard"):
        set_adapter(model, write(tmp_path / "adapter", **options))


def test_mlx_lm_trains_and_fuses_the_update(tmp_path: Path) -> None:
    model = make_turned(bits=8)
    bare = logits(model)
    model.freeze()
    tuner = mlx_lm_module("tuner")
    tuner.linear_to_lora_layers(model, -1, {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["mlp.down_proj"]})
    assert {name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())} == {"lora_a", "lora_b"}
    assert np.array_equal(logits(model), bare)  # lora_b is zero

    def loss(model: ArceeForCausalLM) -> mx.array:
        return mx.square(model(mx.array([[5, 17, 300]]))).mean()

    model.train()
    gradients = nn.value_and_grad(model, loss)(model)[1]["model"]["layers"][0]["mlp"]["down_proj"]
    assert mx.abs(gradients["lora_b"]).max().item() > 0
    model.layers[0].mlp.down_proj.lora_b -= gradients["lora_b"]
    model.eval()
    want = logits(model)
    assert not near(want, bare, 1e-3)
    fuse_adapter(model, dequantize=True)
    save_checkpoint(model, tmp_path / "model")
    assert near(logits(load_model(tmp_path / "model")), want)
