"""What mlx-lm loads is the model `arcee_mlx.load` gives: config, names, ties, dtypes, caches, quantization both ways."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

import arcee_mlx
import arcee_mlx.lm
from arcee_mlx.lm.command import main
from arcee_mlx.lm.model import Model, ModelArgs
from arcee_mlx.model.relu2.down import store_by_neuron
from arcee_mlx.upstream import mlx_lm_module

from conftest import flat, tiny_config, write_checkpoint, write_tokenizer
from lm_data import child_environment, free_ports

IDS = mx.array([[5, 6, 7, 300, 8]])
mlx_lm = mlx_lm_module("utils")

OLD = {"model_type": "arcee", "vocab_size": 64, "rope_theta": 5000.0, "torch_dtype": "bfloat16"}
CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {"model_type": "arcee"},
    "old yarn": OLD | {"rope_scaling": {"type": "yarn", "factor": 20, "original_max_position_embeddings": 4096}},
    "old llama3": OLD
    | {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}},
    "new dynamic": {
        "dtype": "float16",
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 300.0},
    },
    "new with infinity": {"rope_parameters": {"rope_type": "linear", "factor": {"__float__": "Infinity"}}},
}


@pytest.mark.parametrize("name", ["ArceeForSequenceClassification", "ArceeForQuestionAnswering"])
def test_a_classifier_is_refused_by_name(tmp_path: Path, name: str) -> None:
    # mlx-lm would leave its head out, and a tied embedding would stand in for the language model's.
    model = getattr(arcee_mlx, name)(tiny_config(tie_word_embeddings=True))
    arcee_mlx.save_checkpoint(model, tmp_path / "x")
    write_tokenizer(tmp_path / "x")
    with pytest.raises(arcee_mlx.ConfigError, match=f"{name}.*generates no text"):
        mlx_lm.load(str(tmp_path / "x"))
    assert main(["server", "--model", str(tmp_path / "x")]) == 2


def logits(path: Path) -> mx.array:
    return arcee_mlx.load_model(path)(IDS)


def write_weights(folder: Path, weights: dict[str, mx.array], **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny_config(**config).to_dict()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_read_as_arcee_mlx_reads_it(values: dict[str, Any]) -> None:
    expected = arcee_mlx.ArceeConfig.from_dict(values)
    args = ModelArgs.from_dict(dict(values))
    assert args.to_dict() == expected.to_dict() and args.model_type == "arcee"


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 4.0}, {"rope_type": "dynamic", "factor": 2.0}])
def test_the_model_is_the_one_arcee_mlx_loads(tmp_path: Path, rope: dict[str, Any]) -> None:
    write_checkpoint(tmp_path / "model", rope_parameters=rope, max_position_embeddings=4, attention_bias=True)
    model, tokenizer, config = mlx_lm.load(str(tmp_path / "model"), return_config=True)
    assert isinstance(model, Model) and model.args.rope["rope_type"] == rope["rope_type"]
    assert model.model_type == config["model_type"] == "arcee" and len(model.layers) == 2
    assert mx.array_equal(model(IDS), logits(tmp_path / "model")).item()
    assert tokenizer.eos_token_ids == {1, 3}


def test_mlx_lm_makes_the_caches_and_a_size_limit_counts(checkpoint: Path) -> None:
    caches = mlx_lm_module("models.cache")
    model, _ = mlx_lm.load(str(checkpoint))
    growing, rotating = caches.make_prompt_cache(model), caches.make_prompt_cache(model, 16)
    assert [type(cache) for cache in growing] == [caches.KVCache] * 2
    assert [(type(cache), cache.max_size, cache.keep) for cache in rotating] == [(caches.RotatingKVCache, 16, 4)] * 2
    assert model.forward(IDS, use_cache=True).past_key_values is not None  # transformers' convention makes its own
    model(mx.arange(60)[None] % 9, cache=rotating)
    for token in range(30):
        model(mx.array([[token]]), cache=rotating)
    assert rotating[0].offset == 90 and rotating[0].nbytes < 2 * 16 * 64 * 4 * 2 * 2


def test_names_and_ties_are_those_of_transformers(tmp_path: Path) -> None:
    weights = dict(flat(write_checkpoint(tmp_path / "source")))
    head, embedding = weights["lm_head.weight"], weights["model.embed_tokens.weight"]
    headless = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    untied = {name.removeprefix("model."): value for name, value in weights.items()}
    cases = {
        "base prefix": (untied, False),
        "stale table": (weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(4)}, False),
        "tied, only the embedding": (headless, True),
        "tied, only the head": (
            {name: value for name, value in weights.items() if name != "model.embed_tokens.weight"},
            True,
        ),
        "tied, both equal": (weights | {"lm_head.weight": embedding}, True),
        "tied, both different": (weights, True),
    }
    for name, (tensors, tie) in cases.items():
        folder = write_weights(tmp_path / name, tensors, tie_word_embeddings=tie)
        model, _ = mlx_lm.load(str(folder))
        assert mx.array_equal(model(IDS), logits(folder)).item(), name
        assert ("lm_head" in model) == (name == "tied, both different" or not tie), name
    assert not mx.array_equal(head, embedding).item()


def test_a_missing_head_is_an_error_that_names_it(tmp_path: Path) -> None:
    weights = dict(flat(write_checkpoint(tmp_path / "source")))
    del weights["lm_head.weight"]
    folder = write_weights(tmp_path / "headless", weights, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        mlx_lm.load(str(folder))


def test_a_quantized_checkpoint_of_arcee_mlx_loads_in_mlx_lm(checkpoint: Path, tmp_path: Path) -> None:
    source, tokenizer = arcee_mlx.load(checkpoint)

    def down_in_8_bits(path: str, module: nn.Module) -> bool | dict[str, int]:
        return {"group_size": 32, "bits": 8} if "down" in path else hasattr(module, "to_quantized")

    nn.quantize(source, 32, 4, class_predicate=down_in_8_bits)
    arcee_mlx.save_checkpoint(source, tmp_path / "q", tokenizer)
    model, _ = mlx_lm.load(str(tmp_path / "q"))
    assert model.layers[0].mlp.down_proj.bits == 8 and model.layers[0].mlp.up_proj.bits == 4
    assert mx.array_equal(model(IDS), logits(tmp_path / "q")).item()
    assert not mx.allclose(model(IDS), logits(checkpoint), atol=1e-3).item()


@pytest.mark.parametrize("recipe", [None, "mixed_3_6"])
def test_a_quantized_checkpoint_of_mlx_lm_loads_in_arcee_mlx(
    checkpoint: Path, tmp_path: Path, recipe: str | None
) -> None:
    mlx_lm_module("convert").convert(
        str(checkpoint), str(tmp_path / "q"), quantize=True, q_group_size=32, quant_predicate=recipe
    )
    model, tokenizer = arcee_mlx.load(tmp_path / "q")
    assert mx.array_equal(model(IDS), mlx_lm.load(str(tmp_path / "q"))[0](IDS)).item()
    assert tokenizer.eos_token_ids == {1, 3}


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the rule of MLX's CPU backend")
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_cpu_backend_computes_in_float32_and_convert_writes_the_checkpoints_dtype(
    checkpoint: Path, tmp_path: Path, key: str
) -> None:
    source = tmp_path / "bfloat16"
    shutil.copytree(checkpoint, source)
    values = json.loads((source / "config.json").read_text())
    del values["dtype"]
    (source / "config.json").write_text(json.dumps(values | {key: "bfloat16"}))
    weights = mx.load(str(checkpoint / "model.safetensors"))
    assert isinstance(weights, dict)
    weights = {name: value.astype(mx.bfloat16) for name, value in weights.items()}
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    convert_model = mlx_lm_module("convert").convert
    for target, quantize in ((tmp_path / "float", False), (tmp_path / "quantized", True)):
        convert_model(str(source), str(target), quantize=quantize, q_group_size=32)
        written = mx.load(str(target / "model.safetensors"))
        assert {value.dtype for value in written.values()} <= {mx.bfloat16, mx.uint32}
        model, _ = mlx_lm.load(str(target))
        assert model(IDS).dtype == mx.float32 and mx.array_equal(model(IDS), logits(target)).item()
    assert mx.array_equal(logits(tmp_path / "float"), logits(source)).item()


RANK = """
import sys, mlx.core as mx, arcee_mlx, arcee_mlx.lm
from mlx_lm.utils import sharded_load
group = mx.distributed.init(backend="ring", strict=True)
part, _ = sharded_load(sys.argv[1], None, group)
ids = mx.array([[5, 6, 7, 8]])
assert group.size() == 2 and part.layers[0].self_attn.num_heads == 2 and part.layers[0].mlp.up_proj.weight.shape[0] == 64
assert mx.abs(part(ids) - arcee_mlx.load_model(sys.argv[1])(ids)).max() < 1e-4
"""


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_two_processes_share_a_model(checkpoint: Path, tmp_path: Path, layout: str) -> None:
    if layout == "by_neuron":
        model = arcee_mlx.load_model(checkpoint)
        store_by_neuron(model)
        nn.quantize(model, group_size=32, bits=8, class_predicate=lambda path, _: path.endswith("down_proj"))
        checkpoint = tmp_path / "by_neuron"
        arcee_mlx.save_checkpoint(model, checkpoint)
        write_tokenizer(checkpoint)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(checkpoint)],
            env=child_environment(MLX_RANK=str(rank), MLX_HOSTFILE=str(hosts)),
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=100)
        assert rank.returncode == 0, errors.decode()
