"""What the tests of `convert` share: checkpoints as transformers saves them, and what MLX makes of them in memory."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, ArceeForCausalLM, load_model, store_by_neuron
from arcee_mlx.conversion.recipe_file import read_recipe
from arcee_mlx.conversion.recipes import Recipe

DTYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
FLOAT = Recipe(quantization=None)
STANDARD = Recipe(layout="standard")  # 4 bits, as mlx_lm.convert stores them
IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
SHAPE = {
    "vocab_size": 133,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_weights(config, model_class=ArceeForCausalLM, **options):
    mx.random.seed(7)
    keys = tree_flatten(model_class(config, **options).parameters())
    return {key: mx.random.normal(value.shape) * 0.08 + ("norm" in key) for key, value in keys}


def write_source(folder, weights=None, *, dtype="BF16", shards=1, architecture="ArceeForCausalLM", **changes):
    """A checkpoint as transformers 4 saves it; `changes` go into the config, None removes a key."""
    folder.mkdir(parents=True)
    values = SHAPE | {"model_type": "arcee", "architectures": [architecture], "hidden_act": "relu2"} | changes
    values.setdefault("torch_dtype", {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype])
    values = {key: value for key, value in values.items() if value is not None}
    if weights is None:
        weights = random_weights(ArceeConfig.from_dict(values))
    weights = {key: value.astype(DTYPES[dtype]) for key, value in weights.items()}
    (folder / "config.json").write_text(json.dumps(values))
    names = sorted(weights)
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        weight_map |= dict.fromkeys(names[i::shards], file)
        mx.save_safetensors(
            str(folder / file), {name: weights[name] for name in names[i::shards]}, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def read_weights(folder):
    weights = {}
    for file in folder.glob("model*.safetensors"):
        weights |= mx.load(str(file))
    return weights


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert mx.array_equal(found[key].view(mx.uint8), value.view(mx.uint8)).item(), key


def assert_nothing_left(folder):
    assert not list(folder.glob("out*")) and not list(folder.glob(".*"))


def in_standard_layout(name):
    """A recipe of the package, for where bits or keys are compared with those of mlx-lm."""
    return replace(read_recipe(name), layout="standard")


def quantized_by_mlx(source, quantization, dtype=mx.bfloat16, *, layout="standard"):
    """What mlx-lm does: cast the whole model, then nn.quantize."""
    model = load_model(source, dtype="auto")
    model.set_dtype(dtype)
    if layout == "by_neuron":
        store_by_neuron(model)
    g, b = quantization.group_size, quantization.bits
    nn.quantize(model, g, b, class_predicate=lambda _, m: hasattr(m, "to_quantized") and m.weight.shape[-1] % g == 0)
    return model
