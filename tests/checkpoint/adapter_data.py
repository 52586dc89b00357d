"""Adapters with random numbers, in mlx-lm's form and in PEFT's, and the tiny models they are put on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from safetensors.numpy import save_file

from arcee_mlx import ArceeForCausalLM
from arcee_mlx.upstream import mlx_lm_module

from conftest import flat, tiny_config

IDS = mx.array([[5, 17, 300, 42, 7, 255, 8]])
ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
EVERYWHERE = [*ATTENTION, "mlp.up_proj", "mlp.down_proj", "lm_head", "model.embed_tokens"]


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


def logits(model: ArceeForCausalLM) -> np.ndarray:
    return np.array(model(IDS).astype(mx.float32))


def adapted(model: nn.Module) -> list[str]:
    return sorted(path for path, module in model.named_modules() if "lora_a" in module)
