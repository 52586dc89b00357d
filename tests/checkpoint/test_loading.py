"""From a folder to a model and back: tying, prefixes, dtypes, quantization, laziness, and what errors say."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, ArceeForCausalLM, ArceeModel, load_model, save_checkpoint
from arcee_mlx.checkpoint.files import open_checkpoint, read_header
from arcee_mlx.errors import CheckpointError, ConfigError, InputError

IDS = mx.array([[1, 5, 9, 30, 2]])
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def config(**changes: Any) -> ArceeConfig:
    values: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    }  # fmt: skip
    return ArceeConfig(**{**values, **changes})


def random_model(cls: Any = ArceeForCausalLM, **changes: Any) -> Any:
    mx.random.seed(1)
    model = cls(config(**changes))
    model.load_weights(
        [(name, 0.3 * mx.random.normal(value.shape)) for name, value in tree_flatten(model.parameters())]
    )
    model.eval()
    return model


def weights(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def same(a: nn.Module, b: nn.Module) -> bool:
    one, two = weights(a), weights(b)
    return one.keys() == two.keys() and all(
        mx.array_equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one
    )


def write(folder: Path, tensors: dict[str, mx.array], **values: Any) -> Path:
    """A checkpoint of chosen tensors, with the JSON of `config()` changed by `values` (None leaves a key out)."""
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    merged = {**config().to_dict(), "architectures": ["ArceeForCausalLM"], **values}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    return folder


@pytest.mark.parametrize("cls", [ArceeForCausalLM, ArceeModel])
@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}], ids=str
)
def test_saved_model_loads_as_it_was(tmp_path: Path, cls: Any, changes: dict[str, Any]) -> None:
    model = random_model(cls, **changes)
    save_checkpoint(model, tmp_path / "x")
    loaded = load_model(tmp_path / "x")
    assert type(loaded) is cls and same(model, loaded)
    assert mx.array_equal(loaded(IDS), model(IDS))
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("cls", [ArceeForCausalLM, ArceeModel])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [False, True])
def test_quantized_model_loads_as_it_was(tmp_path: Path, bits: int, tied: bool, cls: Any) -> None:
    model = random_model(cls, tie_word_embeddings=tied)
    nn.quantize(model, group_size=32, bits=bits)
    save_checkpoint(model, tmp_path / "x")
    loaded = load_model(tmp_path / "x")
    assert same(model, loaded) and mx.array_equal(loaded(IDS), model(IDS))
    table = json.loads((tmp_path / "x" / "config.json").read_text())
    assert table["quantization"] == table["quantization_config"] == {"group_size": 32, "bits": bits, "mode": "affine"}


def mix(path: str, module: nn.Module) -> bool | dict[str, Any]:
    if not hasattr(module, "to_quantized") or "o_proj" in path:
        return False
    return {"group_size": 32, "bits": 8} if "down_proj" in path or "embed" in path else {"group_size": 64, "bits": 4}


@pytest.mark.parametrize("cls", [ArceeForCausalLM, ArceeModel])
def test_layers_quantized_in_different_ways_load_as_they_were(tmp_path: Path, cls: Any) -> None:
    model = random_model(cls)
    nn.quantize(model, class_predicate=mix)
    save_checkpoint(model, tmp_path / "x")
    loaded = load_model(tmp_path / "x")
    assert same(model, loaded) and mx.array_equal(loaded(IDS), model(IDS))


@pytest.mark.parametrize(("saved", "asked"), [(ArceeForCausalLM, ArceeModel), (ArceeModel, ArceeForCausalLM)])
def test_mixed_quantization_survives_the_change_of_prefix(tmp_path: Path, saved: Any, asked: Any) -> None:
    model = random_model(saved, tie_word_embeddings=True)
    nn.quantize(model, class_predicate=mix)
    save_checkpoint(model, tmp_path / "x")
    loaded = load_model(tmp_path / "x", asked)
    base, loaded_base = (m if isinstance(m, ArceeModel) else m.model for m in (model, loaded))
    assert same(base, loaded_base)


def test_quantized_model_made_float_again_is_saved_without_a_table(tmp_path: Path) -> None:
    model = random_model()
    nn.quantize(model, group_size=32, bits=8)
    save_checkpoint(model, tmp_path / "quantized")
    loaded = load_model(tmp_path / "quantized")
    plain = ArceeForCausalLM(loaded.config)
    plain.load_weights(list(weights(random_model()).items()))
    save_checkpoint(plain, tmp_path / "plain")
    values = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization" not in values and "quantization_config" not in values
    assert same(load_model(tmp_path / "plain"), random_model())


def test_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    save_checkpoint(random_model(), tmp_path / "x")
    with pytest.raises(InputError, match="exists already"):
        save_checkpoint(random_model(), tmp_path / "x")
    save_checkpoint(random_model(mlp_bias=True), tmp_path / "x", overwrite=True)
    assert load_model(tmp_path / "x").config.mlp_bias


TENSORS = weights(random_model())
BODY = {name: value for name, value in TENSORS.items() if name != HEAD}


@pytest.mark.parametrize(
    ("tensors", "tied", "expected"),
    [
        (TENSORS, False, "untied"),
        (TENSORS, True, "untied"),
        (BODY, True, "tied"),
        ({**BODY, HEAD: BODY[EMBED]}, True, "tied"),
        ({**BODY, HEAD: BODY[EMBED]}, False, "untied"),
        ({**{k: v for k, v in BODY.items() if k != EMBED}, HEAD: BODY[EMBED]}, True, "tied"),
        (BODY, False, HEAD),
        ({k: v for k, v in TENSORS.items() if k != EMBED}, False, EMBED),
        ({k: v for k, v in BODY.items() if k != EMBED}, True, EMBED),
    ],
    ids=[
        "both",
        "both_differ_tied",
        "embed_tied",
        "equal_tied",
        "equal_untied",
        "head_tied",
        "no_head",
        "no_embed",
        "neither",
    ],
)
def test_head_is_tied_by_what_the_file_holds(
    tmp_path: Path, tensors: dict[str, mx.array], tied: bool, expected: str
) -> None:
    folder = write(tmp_path, tensors, tie_word_embeddings=tied)
    if expected not in ("tied", "untied"):
        with pytest.raises(CheckpointError, match=f"has no tensor '{expected}'.*expected shape \\(64, 64\\)") as error:
            load_model(folder)
        assert str(folder) in str(error.value)
        return
    model = load_model(folder)
    assert ("lm_head" in model) == (expected == "untied")
    assert mx.array_equal(model.model.embed_tokens.weight, BODY[EMBED])
    if expected == "untied":
        assert mx.array_equal(model.lm_head.weight, tensors[HEAD])


def test_prefixes_are_mapped_both_ways(tmp_path: Path) -> None:
    causal = write(tmp_path / "causal", TENSORS)
    base_tensors = {name.removeprefix("model."): value for name, value in TENSORS.items()}
    base = write(tmp_path / "base", {k: v for k, v in base_tensors.items() if k != HEAD}, architectures=["ArceeModel"])
    assert same(load_model(causal, ArceeModel), load_model(base))
    assert same(load_model(write(tmp_path / "mixed", base_tensors)), load_model(causal))
    with pytest.raises(CheckpointError, match=HEAD):
        load_model(base, ArceeForCausalLM)
    tied = write(tmp_path / "tied", {k: v for k, v in base_tensors.items() if k != HEAD}, tie_word_embeddings=True)
    assert mx.array_equal(load_model(tied, ArceeForCausalLM).model.norm.weight, BODY["model.norm.weight"])


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.inv_freq"]
)
def test_stale_rope_table_is_ignored_by_name(tmp_path: Path, name: str) -> None:
    assert same(load_model(write(tmp_path, {**TENSORS, name: mx.ones((3,))})), random_model())


def test_other_architectures_are_refused_with_a_way_out(tmp_path: Path) -> None:
    tensors = {**BODY, "score.weight": mx.ones((3, 64)), "score.bias": mx.ones((3,))}
    folder = write(tmp_path, tensors, architectures=["X"])
    with pytest.raises(ConfigError, match="architectures names 'X'.*model_class"):
        load_model(folder)
    assert same(load_model(folder, ArceeModel), random_model().model)


def test_model_class_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model_class"):
        load_model(write(tmp_path, TENSORS), nn.Linear)  # type: ignore[type-var]


@pytest.mark.parametrize("architectures", [None, []])
def test_config_without_architectures_is_a_causal_model(tmp_path: Path, architectures: Any) -> None:
    assert isinstance(load_model(write(tmp_path, TENSORS, architectures=architectures)), ArceeForCausalLM)


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [
        ({**TENSORS, "model.norm.weight": mx.ones((63,))}, ["model.safetensors", "'model.norm.weight'", "(63,)", "(64,)"]),
        ({**TENSORS, "model.norm.weight": mx.ones((64, 1))}, ["model.safetensors", "'model.norm.weight'", "(64, 1)", "(64,)"]),
        ({**TENSORS, "model.norm.weight": mx.ones((64,), mx.uint32)}, ["model.safetensors", "'model.norm.weight'", "U32", "floats"]),
        ({**TENSORS, "model.layers.2.mlp.up_proj.weight": mx.ones((128, 64))}, ["model.safetensors", "'model.layers.2.mlp.up_proj.weight'"]),
        ({**TENSORS, "model.layers.0.mlp.gate_proj.weight": mx.ones((128, 64))}, ["model.safetensors", "gate_proj"]),
        ({k: v for k, v in TENSORS.items() if "layers.1." not in k}, ["'model.layers.1.input_layernorm.weight' (and 7 more)", "(64,)"]),
    ],
    ids=["short", "shape", "integers", "layer", "gate", "missing"],
)  # fmt: skip
def test_tensor_that_does_not_fit_is_named_with_what_was_expected(
    tmp_path: Path, tensors: dict[str, mx.array], parts: list[str]
) -> None:
    with pytest.raises(CheckpointError) as error:
        load_model(write(tmp_path, tensors))
    for part in [str(tmp_path), *parts]:
        assert part in str(error.value)


def test_folder_with_only_a_pickle_says_so(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin .*only safetensors"):
        load_model(tmp_path)


def halved(dtype: mx.Dtype) -> dict[str, mx.array]:
    return {name: value.astype(dtype) for name, value in TENSORS.items()}


def kinds(model: nn.Module) -> set[mx.Dtype]:
    return {value.dtype for value in weights(model).values()}


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({"dtype": "float16"}, mx.float16), ({"torch_dtype": "bfloat16"}, mx.bfloat16), ({}, mx.bfloat16),
     ({"dtype": "float16", "torch_dtype": "float32"}, mx.float16)],
    ids=str,
)  # fmt: skip
def test_auto_dtype_is_the_configs_then_the_files(tmp_path: Path, stated: dict[str, str], expected: mx.Dtype) -> None:
    folder = write(tmp_path, halved(mx.bfloat16), **stated)
    assert kinds(load_model(folder, dtype="auto")) == {expected}
    for asked, given in (("float32", mx.float32), (mx.float16, mx.float16), ("bfloat16", mx.bfloat16)):
        assert kinds(load_model(folder, dtype=asked)) == {given}


def test_auto_dtype_does_not_come_from_a_stale_rope_table(tmp_path: Path) -> None:
    tensors = {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((8,)), **halved(mx.bfloat16)}
    assert kinds(load_model(write(tmp_path, tensors), dtype="auto")) == {mx.bfloat16}


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the rule of the CPU backend")
def test_cpu_computes_in_float32_unless_told_otherwise(tmp_path: Path) -> None:
    folder = write(tmp_path, halved(mx.bfloat16), dtype="bfloat16")
    assert kinds(load_model(folder)) == {mx.float32}


@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="the rule of the CPU backend")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16", mx.float16], ids=str)
def test_quantized_half_precision_on_the_cpu_is_refused(tmp_path: Path, dtype: Any) -> None:
    model = random_model()
    model.set_dtype(mx.bfloat16)
    nn.quantize(model, group_size=32, bits=4)
    save_checkpoint(model, tmp_path / "x")
    with pytest.raises(InputError, match="wrong by several percent"):
        load_model(tmp_path / "x", dtype=dtype)
    assert kinds(load_model(tmp_path / "x")) == {mx.float32, mx.uint32}


@pytest.mark.parametrize("dtype", ["int8", "half", mx.int32, 5, ""], ids=str)
def test_other_dtypes_are_refused(tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(InputError, match="dtype is"):
        load_model(write(tmp_path, TENSORS), dtype=dtype)


@pytest.mark.parametrize(
    "table",
    [{}, {"bits": 4}, {"group_size": 0, "bits": 4}, {"group_size": 48, "bits": 4}, {"group_size": "64", "bits": 4},
     {"group_size": 64, "bits": 7}, {"group_size": 64, "bits": 4, "mode": "x"}, {"group_size": 32, "bits": None}],
    ids=str,
)  # fmt: skip
def test_wrong_quantization_table_is_an_error_of_ours(tmp_path: Path, table: dict[str, Any]) -> None:
    model = random_model()
    nn.quantize(model, group_size=64, bits=4)
    folder = write(tmp_path, weights(model), quantization=table)
    with pytest.raises((ConfigError, CheckpointError)):
        load_model(folder)


def test_wrong_bits_are_found_by_the_shapes(tmp_path: Path) -> None:
    model = random_model()
    nn.quantize(model, group_size=64, bits=4)
    with pytest.raises(CheckpointError, match="has shape"):
        load_model(write(tmp_path, weights(model), quantization={"group_size": 64, "bits": 8}))


def test_loading_leaves_the_random_state_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, TENSORS)
    for seed in (0, 7, 2**40 + 3):
        mx.random.seed(seed)
        mx.eval(mx.random.normal((2,)))
        before = mx.random.state[0].tolist()
        load_model(folder)
        assert mx.random.state[0].tolist() == before
    for tensors in (BODY, {**TENSORS, "x": mx.ones(1)}):
        with pytest.raises(CheckpointError):
            load_model(write(tmp_path, tensors))
        assert mx.random.state[0].tolist() == before


def test_two_threads_load_at_once(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    models = [random_model(mlp_bias=bias) for bias in (False, True)]
    for folder, model in zip(folders, models, strict=True):
        save_checkpoint(model, folder)

    def work(i: int) -> bool:
        loaded = load_model(folders[i % 2])
        mx.eval(loaded(IDS))
        return same(loaded, models[i % 2])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(12)))


def bytes_read() -> int:
    return int(
        next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")).split()[1]
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes read by /proc/self/io")
@pytest.mark.parametrize("asked", [ArceeForCausalLM, ArceeModel])
def test_loading_reads_no_tensor_before_it_is_used(tmp_path: Path, asked: Any) -> None:
    model = random_model(intermediate_size=4096)
    save_checkpoint(model, tmp_path / "x")
    size = os.path.getsize(tmp_path / "x" / "model.safetensors")
    load_model(tmp_path / "x", asked)
    before = bytes_read()
    loaded = load_model(tmp_path / "x", asked)
    assert bytes_read() - before < size / 20
    before = bytes_read()
    mx.eval((loaded if asked is ArceeModel else loaded.model).norm.weight)
    assert bytes_read() - before < size / 20
    mx.eval(loaded.parameters())
    assert bytes_read() - before > size / 2


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes read by /proc/self/io")
def test_unused_tensors_are_never_read(tmp_path: Path) -> None:
    # The base model of a causal checkpoint leaves the head, here most of the file, where it is.
    model = random_model(vocab_size=20_000, num_hidden_layers=1)
    save_checkpoint(model, tmp_path / "x")
    entry = read_header(tmp_path / "x" / "model.safetensors")[HEAD]
    loaded = load_model(tmp_path / "x", ArceeModel)
    before = bytes_read()
    mx.eval(loaded.parameters())
    read = bytes_read() - before
    assert read < os.path.getsize(entry.file) - entry.nbytes + 100_000


def test_arrays_of_a_checkpoint_are_those_of_its_entries_only(tmp_path: Path) -> None:
    folder = write(tmp_path, {**TENSORS, "model.rotary_emb.inv_freq": mx.ones((3,))})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.arrays().keys() == checkpoint.entries.keys()


def test_saved_config_says_what_was_saved(tmp_path: Path) -> None:
    model = random_model()
    model.set_dtype(mx.bfloat16)
    save_checkpoint(model, tmp_path / "x")
    values = json.loads((tmp_path / "x" / "config.json").read_text())
    assert values["dtype"] == "bfloat16" and values["architectures"] == ["ArceeForCausalLM"]
    assert values["model_type"] == "arcee" and values["tie_word_embeddings"] is False
    untied = ArceeForCausalLM(config(tie_word_embeddings=True), tied=False)
    save_checkpoint(untied, tmp_path / "y")
    assert json.loads((tmp_path / "y" / "config.json").read_text())["tie_word_embeddings"] is False
