"""Writes a checkpoint of AFM-4.5B's shape with random bfloat16 weights, to measure conversion, loading and decoding on.

    python -m arcee_mlx.bench.afm_shape FOLDER [--layers 36]

All 36 layers are 9.24 GB on disk, made with a few hundred MB of memory. There is no tokenizer: what a model of random
weights says has no meaning.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..checkpoint.files import TensorWriter, new_folder, plan_shards, write_index, write_json
from ..program import run_program

AFM_CONFIG: dict[str, Any] = {
    "architectures": ["ArceeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128003,
    "head_dim": 128,
    "hidden_act": "relu2",
    "hidden_size": 2560,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "max_position_embeddings": 65536,
    "mlp_bias": False,
    "model_type": "arcee",
    "num_attention_heads": 20,
    "num_hidden_layers": 36,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 20.0,
        "mscale": 1.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "type": "yarn",
    },
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
    "use_cache": True,
    "vocab_size": 128005,
}
_BLOCK_WEIGHTS = 2**23  # drawn at once


def tensor_shapes(layers: int, config: Mapping[str, Any] = AFM_CONFIG) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers saves them, in the model's order."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "post_attention_layernorm": (hidden,),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def count_weights(layers: int, config: Mapping[str, Any] = AFM_CONFIG) -> int:
    """Weights of a checkpoint with so many layers; each takes two bytes."""
    return sum(math.prod(shape) for shape in tensor_shapes(layers, config).values())


def write_checkpoint(
    folder: Path, layers: int, *, config: Mapping[str, Any] = AFM_CONFIG, progress: bool = False
) -> int:
    """Writes config and weights, the same ones each time; the folder appears when it is complete.

    Args:
        folder: a new one.
        layers: number of decoder layers, in place of the config's.
        config: of the checkpoint; its head must be untied.
        progress: show a bar on standard error, if that is a terminal.

    Returns:
        bytes of the weights.
    """
    shapes = tensor_shapes(layers, config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    shards = plan_shards(sizes)
    key = mx.random.key(0)
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, disable=None if progress else True)
    with bar, new_folder(folder) as partial:
        for file, names in shards.items():
            writer = TensorWriter(partial / file, {name: ("BF16", shapes[name]) for name in names})
            try:
                for name in names:
                    key, own_key = mx.random.split(key)
                    _write_random(writer, name, shapes[name], own_key)
                    bar.update(sizes[name])
                writer.close()
            finally:
                writer.abort()
        write_index(partial, shards, sum(sizes.values()))
        write_json(partial / "config.json", {**config, "num_hidden_layers": layers})
    return sum(sizes.values())


def _write_random(writer: TensorWriter, name: str, shape: tuple[int, ...], key: mx.array) -> None:
    """Norms are ones, everything else is drawn from a normal distribution of standard deviation 0.02."""
    if len(shape) == 1:
        writer.write(name, mx.ones(shape, mx.bfloat16))
        return
    rows, columns = shape
    step = max(1, _BLOCK_WEIGHTS // columns)
    for start in range(0, rows, step):
        key, own_key = mx.random.split(key)
        size = (min(step, rows - start), columns)
        writer.write(name, mx.random.normal(size, mx.float32, scale=0.02, key=own_key).astype(mx.bfloat16))


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--layers", type=int, default=36, metavar="N", help="decoder layers (36, as AFM-4.5B has)")


def _run(args: argparse.Namespace) -> int:
    written_bytes = write_checkpoint(args.folder, args.layers, progress=True)
    print(f"{args.folder}: {written_bytes / 1e9:.2f} GB of random weights")
    return 0


if __name__ == "__main__":
    sys.exit(
        run_program(
            "python -m arcee_mlx.bench.afm_shape",
            "Write a checkpoint of AFM-4.5B's shape with random weights.",
            _add_arguments,
            _run,
        )
    )
