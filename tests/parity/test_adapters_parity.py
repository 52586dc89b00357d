"""Adapters against the peft library: its own put on by us, ours written for it."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers on torch")
peft = pytest.importorskip("peft", reason="compares with peft")

from arcee_mlx import fuse_adapter, load_model, save_peft_adapter, set_adapter  # noqa: E402
from arcee_mlx.upstream import mlx_lm_module  # noqa: E402

from reference import as_numpy, assert_close, both, random_ids, saved, tiny  # noqa: E402

pytestmark = pytest.mark.parity

IDS, MY_IDS = both(random_ids((2, 12)))
QUERY_AND_DOWN = ["q_proj", "down_proj"]
BIASES = {"attention_bias": True, "mlp_bias": True}


def their_adapter(base: Any, folder: Path, **config: Any) -> Any:
    """base with peft's adapter on it as peft loads it from `folder`; its trained part is random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses deprecated parts of transformers, and warns of much
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if "magnitude" in name:
                    parameter.mul_(1 + 0.3 * noise)
                elif "lora" in name:
                    parameter.copy_(0.2 * noise)
                elif parameter.requires_grad:
                    parameter.add_(0.1 * noise)
        model.save_pretrained(folder)
        return peft.PeftModel.from_pretrained(base, folder).eval()


def their_logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


ADAPTERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {"target_modules": QUERY_AND_DOWN}),
    "alpha": ({}, {"target_modules": QUERY_AND_DOWN, "r": 3, "lora_alpha": 5, "lora_dropout": 0.1}),
    "rslora": ({}, {"target_modules": QUERY_AND_DOWN, "use_rslora": True, "r": 6}),
    "dora": ({}, {"target_modules": QUERY_AND_DOWN, "use_dora": True}),
    "dora_with_biases": (BIASES, {"target_modules": "all-linear", "use_dora": True, "r": 2, "lora_alpha": 3}),
    "dora_on_the_head": ({}, {"target_modules": ["lm_head", "k_proj"], "use_dora": True}),
    "dora_rslora_patterns": (BIASES, {"target_modules": QUERY_AND_DOWN, "use_dora": True, "use_rslora": True,
                                      "rank_pattern": {"q_proj": 3}, "alpha_pattern": {r"layers\.1\..*": 2}}),
    "rank_pattern": ({}, {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3, "layers.1.mlp.up_proj": 5},
                          "alpha_pattern": {"q_proj": 1, r".*layers.0.*": 11}}),
    "regular_expression": ({}, {"target_modules": r".*layers\.1\.(self_attn\.[qv]|mlp\.up)_proj"}),
    "some_layers": ({}, {"target_modules": ["o_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    "excluded": ({}, {"target_modules": ["o_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]}),
    "head": ({}, {"target_modules": ["lm_head"]}),
    "embedding": ({}, {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True}),
    "embedding_and_head": ({}, {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2}}),
    "saved_modules": ({}, {"target_modules": QUERY_AND_DOWN, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "saved_block": (BIASES, {"target_modules": ["q_proj"], "modules_to_save": ["layers.1.mlp", "score"]}),
    "all_biases": (BIASES, {"target_modules": QUERY_AND_DOWN, "bias": "all"}),
    "own_biases": (BIASES, {"target_modules": QUERY_AND_DOWN, "bias": "lora_only"}),
    "gaussian": ({}, {"target_modules": QUERY_AND_DOWN, "init_lora_weights": "gaussian"}),
    "orthogonal": ({}, {"target_modules": QUERY_AND_DOWN, "init_lora_weights": "orthogonal"}),
    "mica": ({}, {"target_modules": QUERY_AND_DOWN, "init_lora_weights": "mica"}),
    "fan_in_fan_out": ({}, {"target_modules": QUERY_AND_DOWN, "fan_in_fan_out": True}),
    "tied": ({"tie_word_embeddings": True}, {"target_modules": "all-linear"}),
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_computes_what_peft_computes(tmp_path: Path, name: str) -> None:
    changes, config = ADAPTERS[name]
    theirs = their_adapter(saved(tiny(**changes), tmp_path / "base"), tmp_path / "adapter", **config)
    bare, model = load_model(tmp_path / "base"), load_model(tmp_path / "base", adapter_path=tmp_path / "adapter")
    expected = their_logits(theirs)
    assert_close(model(MY_IDS), expected)
    assert np.abs(as_numpy(bare(MY_IDS)) - as_numpy(expected)).max() > 0.05
    fuse_adapter(model)
    assert_close(model(MY_IDS), expected, atol=5e-4)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_an_adapter_of_peft_on_a_quantized_base(tmp_path: Path, config: dict[str, Any]) -> None:
    base = saved(tiny(hidden_size=64, intermediate_size=96), tmp_path / "base")
    model = load_model(tmp_path / "base")
    nn.quantize(model, group_size=32, bits=4)
    with torch.no_grad():  # the numbers that the quantized weights stand for
        for path, module in model.named_modules():
            if hasattr(module, "bits"):
                weight = mx.dequantize(module.weight, module.scales, module.biases, module.group_size, module.bits)
                base.get_submodule(path).weight.copy_(torch.tensor(np.array(weight)))
    theirs = their_adapter(base, tmp_path / "adapter", target_modules=[*QUERY_AND_DOWN, "lm_head"], **config)
    # peft saved the head's base along, float and equal: it stands in for the quantized one
    set_adapter(model, tmp_path / "adapter")
    assert_close(model(MY_IDS), their_logits(theirs))


OURS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "last_layer": {"num_layers": 1},
    "embedding_and_head": {"keys": ["self_attn.k_proj", "lm_head", "model.embed_tokens"]},
    "own_ranks": {"own_ranks": True},
}


@pytest.mark.parametrize("name", OURS)
def test_peft_loads_what_is_written_and_computes_the_same(tmp_path: Path, name: str) -> None:
    base = saved(tiny(), tmp_path / "base")
    model = load_model(tmp_path / "base")
    options = {"num_layers": -1, "use_dora": False, "keys": None, "own_ranks": False} | OURS[name]
    lora = {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": options["keys"]}
    mlx_lm_module("tuner").linear_to_lora_layers(model, options["num_layers"], lora, use_dora=options["use_dora"])
    mx.random.seed(0)
    for layer in [module for _, module in model.named_modules() if "lora_a" in module]:
        layer.lora_a, layer.lora_b = (0.2 * mx.random.normal(own.shape) for own in (layer.lora_a, layer.lora_b))
        if "m" in layer:
            layer.m = layer.m * mx.random.uniform(0.5, 1.5, layer.m.shape)
    if options["own_ranks"]:
        layer = model.layers[0].mlp.up_proj
        layer.lora_a, layer.lora_b, layer.scale = layer.lora_a[:, :2], layer.lora_b[:2], 0.3
    model.eval()
    save_peft_adapter(model, tmp_path / "peft", base_model=str(tmp_path / "base"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft").eval()
        whole = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").eval()
    names = {path.removeprefix("base_model.model.") for path, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert names == {path for path, module in model.named_modules() if "lora_a" in module}
    assert_close(model(MY_IDS), their_logits(theirs))
    assert_close(model(MY_IDS), their_logits(whole))
    assert np.abs(as_numpy(load_model(tmp_path / "base")(MY_IDS)) - as_numpy(model(MY_IDS))).max() > 0.05
