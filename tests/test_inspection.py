"""inspect_checkpoint and `arcee-mlx inspect`: true numbers, every problem named, no weight read or downloaded."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import arcee_mlx
from arcee_mlx import (
    ArceeError,
    ArceeForCausalLM,
    ArceeModel,
    CheckpointError,
    HubError,
    InputError,
    Inspection,
    inspect_checkpoint,
    load,
    load_model,
    save_checkpoint,
)
from arcee_mlx.checkpoint import files
from arcee_mlx.cli import main
from arcee_mlx.inspection.command import count_words, describe, size_words
from arcee_mlx.model.config import ROPE_TYPES

from conftest import CHAT_TEMPLATE, tiny_config, write_checkpoint, write_tokenizer
from loopback_hub import LoopbackHub

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
YARN = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}


def texts(inspection: Inspection, level: str) -> str:
    return "\n".join(f"{f.topic}: {f.text}" for f in inspection.findings if f.level == level)


def copy(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    return folder


def change_json(path: Path, *removed: str, **changes: object) -> None:
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in removed}
    path.write_text(json.dumps(kept | changes))


def change_config(*removed: str, **changes: object) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / "config.json", *removed, **changes)


def change_tensors(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = dict(mx.load(str(folder / "model.safetensors")))
        mx.eval(tensors)
        change(tensors)
        (folder / "model.safetensors").unlink()
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)

    return rewrite


def shard(folder: Path, shard_bytes: int = 300_000) -> None:
    """The weights in two files with an index, as large checkpoints have them."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    shards = files.plan_shards({name: value.nbytes for name, value in tensors.items()}, shard_bytes)
    assert tuple(shards) == SHARDS
    for name, names in shards.items():
        mx.save_safetensors(str(folder / name), {key: tensors[key] for key in names})
    files.write_index(folder, shards, sum(value.nbytes for value in tensors.values()))


def upload(hub: LoopbackHub, folder: Path, repo_id: str = "org/model") -> dict[str, bytes]:
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add(repo_id, contents)
    return contents


# What is said of a sound checkpoint


def test_a_sound_checkpoint_loads_and_its_numbers_are_the_models(checkpoint: Path) -> None:
    model, tokenizer = load(checkpoint)
    inspection = inspect_checkpoint(checkpoint)
    assert inspection.loads and not texts(inspection, "error") and not texts(inspection, "warning")
    assert inspection.weights is not None and inspection.memory is not None and inspection.tokenizer is not None
    weights = dict(tree_flatten(model.parameters()))
    total = inspection.weights.total
    assert total.parameters == sum(value.size for value in weights.values())
    assert total.tensors == len(weights) and total.bits_per_weight == 32
    assert inspection.weights.dtypes == {"F32": len(weights)}
    assert inspection.weights.parts["embedding"].parameters == model.model.embed_tokens.weight.size
    assert inspection.weights.parts["norms"].tensors == 2 * len(model.layers) + 1
    assert set(inspection.weights.parts) == {"embedding", "attention", "mlp", "norms", "head"}
    cache = model.make_cache()
    model(mx.array([[0]]), cache=cache)
    kept = sum(layer.keys[:, :, :1].size + layer.values[:, :, :1].size for layer in cache)
    assert inspection.memory.kv_bytes_per_token == 2 * kept
    assert inspection.memory.full_context_bytes == total.size_bytes + 256 * 2 * kept
    assert inspection.tokenizer.vocab_size == tokenizer.vocab_size
    assert inspection.tokenizer.special_tokens["eos_token"] == ("</s>", 1)
    assert inspection.tokenizer.eos_tokens == {1: "</s>", 3: "<|im_end|>"}
    assert inspection.config["hidden_size"] == 64
    assert inspection.files["model.safetensors"].use == "weights"
    assert inspection.sampling["temp"] == 0


def test_afm_sized_numbers_are_right_without_afm(tmp_path: Path) -> None:
    """Headers say it all: a file of AFM-4.5B's shapes whose 9.24 GB are a hole in the disk."""
    values = {
        "model_type": "arcee", "architectures": ["ArceeForCausalLM"], "vocab_size": 128005, "hidden_size": 2560,
        "intermediate_size": 18432, "num_hidden_layers": 36, "num_attention_heads": 20, "num_key_value_heads": 4,
        "head_dim": 128, "max_position_embeddings": 65536, "rope_scaling": YARN, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    model = ArceeForCausalLM(arcee_mlx.ArceeConfig.from_dict(values))
    table, offset = {}, 0
    for name, array in tree_flatten(model.parameters()):
        table[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [offset, offset + 2 * array.size]}
        offset += 2 * array.size
    header = json.dumps(table).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + offset)
    write_tokenizer(tmp_path)
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.loads and inspection.weights and inspection.memory and inspection.context
    assert round(inspection.weights.total.parameters / 1e9, 2) == 4.62
    assert round(inspection.weights.total.size_bytes / 1e9, 2) == 9.24
    assert inspection.memory.kv_bytes_per_token == 73_728
    assert round(inspection.context.attention_factor, 5) == 1.29957
    assert inspection.context.tokens == 65536


@pytest.mark.parametrize("mixed", [False, True])
def test_quantized_weights_count_as_many_parameters_as_floats(tmp_path: Path, mixed: bool) -> None:
    model = write_checkpoint(tmp_path / "float")
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    nn.quantize(
        model,
        class_predicate=lambda path, layer: (
            hasattr(layer, "to_quantized")
            and {"group_size": 32, "bits": 8 if mixed and path.endswith(("embed_tokens", "down_proj")) else 4}
        ),
    )
    save_checkpoint(model, tmp_path / "quantized")
    write_tokenizer(tmp_path / "quantized")
    inspection = inspect_checkpoint(tmp_path / "quantized")
    assert inspection.loads and inspection.weights is not None
    total = inspection.weights.total
    assert total.parameters == parameters
    assert total.size_bytes == sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    forms = {"F32", "4 bits in groups of 32"} | ({"8 bits in groups of 32"} if mixed else set())
    assert set(inspection.weights.forms) == forms
    # Scales and biases are float32 here: 64 bits for each group of 32 weights.
    assert inspection.weights.forms["4 bits in groups of 32"].bits_per_weight == 6
    assert inspection.weights.part_forms["mlp"] == tuple(sorted(forms - {"F32"}))


def test_a_decoder_without_head_is_one_and_needs_no_tokenizer(tmp_path: Path) -> None:
    save_checkpoint(ArceeModel(tiny_config()), tmp_path / "base")
    inspection = inspect_checkpoint(tmp_path / "base")
    assert inspection.loads and "head" not in inspection.weights.parts  # type: ignore[union-attr]
    assert "tokenizer.json is missing" in texts(inspection, "warning")
    load_model(tmp_path / "base")


def test_no_tensor_is_read(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(files, "read_rows", refuse)
    monkeypatch.setattr(mx, "load", refuse)
    assert inspect_checkpoint(checkpoint).loads


def test_global_random_numbers_are_as_before(checkpoint: Path) -> None:
    mx.random.seed(7)
    before = mx.random.state[0].tolist()
    inspect_checkpoint(checkpoint)
    assert mx.random.state[0].tolist() == before


# What is wrong: each damage, whether it still loads, and what is said


def rename(old: str, new: str) -> Callable[[dict[str, mx.array]], None]:
    def change(tensors: dict[str, mx.array]) -> None:
        tensors[new] = tensors.pop(old)

    return change


def drop(*names: str) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: [tensors.pop(name) for name in names])


def put(name: str, value: mx.array) -> Callable[[Path], None]:
    return change_tensors(lambda tensors: tensors.update({name: value}))


def sharded(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shard(folder)
        change(folder)

    return damage


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / files.INDEX_FILE
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return sharded(damage)


def replace_by_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / files.INDEX_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


UP_SCALES = "model.layers.0.mlp.up_proj.scales"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config: config.json: no such file"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config: config.json: cannot be read"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "config: config.json: holds a list"),
    "other model": (change_config(model_type="llama"), "config: config.json: model_type 'llama'; expected 'arcee'"),
    "foreign key": (change_config(qk_norm=True), "config: config.json: qk_norm is True"),
    "unknown rope": (change_config(rope_parameters={"rope_type": "su"}), "rope_parameters.rope_type is 'su'"),
    "rope without factor": (change_config(rope_parameters={"rope_type": "linear"}), "rope_parameters.factor is 'nothing'"),
    "value of a wrong type": (change_config(quantization_config=[1]), "quantization_config is [1]; expected"),
    "unknown class": (change_config(architectures=["Other"]), "config: config.json: architectures names 'Other'"),
    "pickles only": (replace_by_pickle, "weights: holds pytorch_model.bin but no model.safetensors"),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "has no model.safetensors and no model.safetensors.i"),
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 5000), "weights: model.safetensors: is 5000 bytes"),
    "no tensors": (lambda f: mx.save_safetensors(str(f / "model.safetensors"), {}), "weights: missing: lm_head.weight"),
    "empty index": (change_index(lambda v: v.update(weight_map={})), "weights: missing: lm_head.weight"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "no whole safetensors file"),
    "missing tensor": (drop(Q_PROJ), f"weights: missing: {Q_PROJ} (128, 64)"),
    "missing head": (drop("lm_head.weight"), "missing: lm_head.weight (400, 64); the head cannot be made up"),
    "foreign tensor": (put("model.extra.weight", mx.zeros(3)), "config.json describes: model.extra.weight"),
    "wrong shape": (put(Q_PROJ, mx.zeros((3, 64))), f"{Q_PROJ} has shape (3, 64); expected (128, 64)"),
    "all shapes wrong": (change_config(hidden_size=128), "more tensors that do not fit config.json"),
    "integers": (put(Q_PROJ, mx.zeros((128, 64), mx.uint32)), f"{Q_PROJ} has dtype U32; expected floats"),
    "unknown dtype": (put(Q_PROJ, mx.zeros((128, 64), mx.int32)), f"'{Q_PROJ}' has dtype I32; expected one of F32"),
    "no quantization table": (
        put(UP_SCALES, mx.zeros((128, 2))), "'model.layers.0.mlp.up_proj'"
    ),
    "quantization MLX has not": (
        lambda f: [
            put(UP_SCALES, mx.zeros((128, 2)))(f),
            change_config(quantization={"group_size": 32, "bits": 11})(f),
        ],
        "quantization of 'model.layers.0.mlp.up_proj' is {",
    ),
    "quantization of another kind": (
        lambda f: [put(UP_SCALES, mx.zeros((128, 2)))(f), change_config(quantization="q4")(f)],
        "quantization is 'q4'; expected an object",
    ),
    "missing shard": (sharded(lambda f: (f / SHARDS[1]).unlink()), f"weights: {SHARDS[1]}: no such file"),
    "damaged shard": (sharded(lambda f: os.truncate(f / SHARDS[0], 999)), f"weights: {SHARDS[0]}: is 999 bytes"),
    "index leads outside": (
        change_index(lambda v: v["weight_map"].update({Q_PROJ: "../model.safetensors"})), "names the file '../model"
    ),
    "index without map": (change_index(lambda v: v.pop("weight_map")), "has no usable weight_map"),
    "index too long": (
        change_index(lambda v: v["weight_map"].update({"more": SHARDS[0]})), f"{SHARDS[0]}: has no tensor 'more'"
    ),
    "index too short": (change_index(lambda v: v["weight_map"].pop(Q_PROJ)), f": holds '{Q_PROJ}', which"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer: tokenizer.json is missing"),
    "damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer: tokenizer.json cannot be read"),
    "damaged defaults": (lambda f: (f / "generation_config.json").write_text("{"), "generation_config.json cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("damage", REFUSED.values(), ids=REFUSED)
def test_what_load_refuses_is_an_error_by_name(
    checkpoint: Path, tmp_path: Path, damage: tuple[Callable[[Path], object], str]
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    damage[0](folder)
    with pytest.raises(ArceeError):
        load(folder)
        load_model(folder)
    inspection = inspect_checkpoint(folder)
    assert not inspection.loads
    assert damage[1] in texts(inspection, "error")
    assert str(tmp_path) not in texts(inspection, "error"), "names are relative to the checkpoint"


def test_all_problems_are_told_at_once(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    drop("model.norm.weight", "model.layers.1.mlp.up_proj.weight")(folder)
    put("model.extra", mx.zeros(2))(folder)
    put(Q_PROJ, mx.zeros((3, 64)))(folder)
    (folder / "tokenizer.json").unlink()
    errors = texts(inspect_checkpoint(folder), "error")
    for name in (
        "model.norm.weight (64,)",
        "model.layers.1.mlp.up_proj.weight",
        "model.extra",
        Q_PROJ,
        "tokenizer.json",
    ):
        assert name in errors


def test_tensors_of_a_missing_shard_are_not_reported_one_by_one(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    sharded(lambda f: (f / SHARDS[0]).unlink())(folder)
    inspection = inspect_checkpoint(folder)
    assert [f.text.split(":")[0] for f in inspection.findings if f.level == "error"] == [SHARDS[0]]
    assert inspection.weights is not None and inspection.weights.files == (SHARDS[1],)


def test_a_rope_that_cannot_be_computed_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    rope = {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}
    change_config(rope_parameters=rope)(folder)
    assert "does not rotate all 32 dimensions" in texts(inspect_checkpoint(folder), "error")
    with pytest.raises(ArceeError, match="does not rotate all"):
        load_model(folder)(mx.array([[1]]))


def tied(**changes: object) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        change_config(tie_word_embeddings=True)(folder)
        head = mx.load(str(folder / "model.safetensors"))["model.embed_tokens.weight"]
        if changes.get("head") == "equal":
            put("lm_head.weight", head)(folder)
        if changes.get("lost"):
            drop(str(changes["lost"]))(folder)

    return make


def rope(**options: object) -> Callable[[Path], None]:
    """As transformers 4 wrote it: rope_scaling, beside what the changes name."""
    return change_config("rope_parameters", rope_theta=10000.0, **options)


def write(name: str, text: str = "x") -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ODD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "tied, one stored": (tied(lost="lm_head.weight"), "", ""),
    "tied, head stored": (tied(lost="model.embed_tokens.weight"), "note", "stored as lm_head: the embedding is taken"),
    "tied, both equal": (tied(head="equal"), "note", "tied, and stored twice"),
    "tied, both differ": (tied(), "warning", "the files hold two that differ: both are used"),
    "stale frequencies": (put("model.layers.0.self_attn.rotary_emb.inv_freq", mx.zeros(16)), "note", "1 stale rotary_emb"),
    "other dtype": (change_config(dtype="bfloat16"), "warning", "config.json says bfloat16, the files hold float32"),
    "several dtypes": (
        put("model.norm.weight", mx.ones(64, mx.float16)), "note", "floats of several dtypes: 18 float32, 1 float16"
    ),
    "table for floats": (change_config(quantization={"group_size": 32, "bits": 4}), "warning", "no tensor is quantized"),
    "tables differ": (
        change_config(quantization={"group_size": 32, "bits": 4}, quantization_config={"bits": 8}), "warning",
        "quantization and quantization_config differ",
    ),
    "index size": (
        change_index(lambda v: v["metadata"].update(total_size=1)), "note", "says 1 bytes of tensors; the files hold"
    ),
    "two ropes": (
        rope(rope_scaling=SCALED, rope_parameters={"rope_type": "default"}), "warning", "rope_scaling counts"
    ),
    "two types": (rope(rope_scaling=SCALED | {"type": "linear"}), "warning", "rope_type 'yarn' and type 'linear' differ"),
    "two thetas": (rope(rope_scaling=SCALED | {"rope_theta": 5.0}), "warning", "rope_theta is 10000.0 and in"),
    "two lengths": (
        rope(rope_scaling=SCALED, original_max_position_embeddings=32), "warning", "own options 64: 32 counts"
    ),
    "default with factor": (rope(rope_scaling={"factor": 2.0}), "warning", "factor of the rope: ignored"),
    "mscale alone": (rope(rope_scaling=SCALED | {"mscale": 0.5}), "warning", "mscale of the rope: ignored"),
    "rope that fits": (rope(rope_scaling=SCALED), "", ""),
    "rope too short": (rope(rope_scaling=SCALED | {"factor": 2.0}), "warning", "reaches 128 positions (64 x 2) of the 256"),
    "rope too long": (rope(rope_scaling=SCALED | {"factor": 8.0}), "note", "would reach 512 positions (64 x 8)"),
    "fewer ids": (
        lambda f: [change_config(vocab_size=401)(f), change_tensors(lambda t: t.update(
            {n: mx.zeros((401, 64)) for n in ("model.embed_tokens.weight", "lm_head.weight")}))(f)],
        "note", "400 ids; the embedding has 401 rows, 1 to spare",
    ),
    "more ids": (
        lambda f: [change_config(vocab_size=399)(f), change_tensors(lambda t: t.update(
            {n: mx.zeros((399, 64)) for n in ("model.embed_tokens.weight", "lm_head.weight")}))(f)],
        "warning", "400 ids for an embedding of 399: the last 1 have no row",
    ),
    "other bos": (change_config(bos_token_id=7), "warning", "bos_token_id is 7 in config.json, and 0 by the tokenizer's"),
    "no pad": (
        lambda f: change_json(f / "tokenizer_config.json", "pad_token"), "note", "no pad token"
    ),
    "no template": (
        lambda f: change_json(f / "tokenizer_config.json", "chat_template"), "note", "no chat template: a prompt is cont"
    ),
    "broken template": (write("chat_template.jinja", "{% if %}"), "warning", "template: chat template 'default', line 1"),
    "template that forgets": (write("chat_template.jinja", "hello"), "warning", "leaves out what the assistant said"),
    "template that does not stop": (
        write("chat_template.jinja", CHAT_TEMPLATE.replace("<|im_end|>", "<pad>")), "warning",
        "ends an answer with '<pad>' (id 4), which does not end generation",
    ),
    "named templates only": (
        lambda f: change_json(f / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "x"}]), "warning",
        "no chat template is called default",
    ),
    "no end": (
        lambda f: [change_config("eos_token_id")(f), change_json(f / "tokenizer_config.json", "eos_token"),
                   change_json(f / "generation_config.json", "eos_token_id")],
        "warning", "an answer ends at max_tokens only",
    ),
    "defaults without end": (
        lambda f: change_json(f / "generation_config.json", "eos_token_id"), "note", "names no eos_token_id"
    ),
    "end beyond": (
        lambda f: change_json(f / "generation_config.json", eos_token_id=[1, 3, 900]), "warning", "ids [900] are beyond"
    ),
    "no defaults": (lambda f: (f / "generation_config.json").unlink(), "note", "no generation_config.json"),
    "bad defaults": (
        lambda f: change_json(f / "generation_config.json", top_p=7, do_sample=True), "warning", "top_p is 7; expected"
    ),
    "code": (write("modeling_arcee.py"), "note", "modeling_arcee.py: code that is never run"),
    "pickles besides": (write("pytorch_model.bin"), "note", "pytorch_model.bin: never read"),
    "other weights": (write("consolidated.safetensors"), "note", "consolidated.safetensors: weights that are not part"),
}  # fmt: skip


@pytest.mark.parametrize("oddity", ODD.values(), ids=ODD)
def test_what_is_odd_and_loads_is_told(
    checkpoint: Path, tmp_path: Path, oddity: tuple[Callable[[Path], object], str, str]
) -> None:
    change, level, text = oddity
    folder = copy(checkpoint, tmp_path / "copy")
    change(folder)
    load(folder)
    inspection = inspect_checkpoint(folder)
    assert inspection.loads, texts(inspection, "error")
    assert text in texts(inspection, level)
    if not level:
        assert not inspection.findings


ROPE_KEYS = ("rope_type", "factor", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor", "mscale")
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(), st.text(max_size=5),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(ROPE_KEYS), st.one_of(st.sampled_from(ROPE_TYPES), st.integers(0, 9), st.floats())),
    st.dictionaries(st.sampled_from(["rope_type", "factor", "bits"]), st.integers(0, 4)),
)  # fmt: skip
KEYS = st.sampled_from(
    [*arcee_mlx.ArceeConfig().to_dict(), "architectures", "rope_scaling", "quantization", "quantization_config",
     "id2label", "dtype", "sliding_window", "layer_types"]
)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(KEYS, VALUES, min_size=1, max_size=3))
def test_any_config_is_inspected_and_judged_as_load_model_judges(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, changes: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    for path in checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(json.loads((checkpoint / "config.json").read_text()) | changes))
    try:
        load_model(folder)(mx.array([[1]]))
        loads = True
    except Exception:
        loads = False
    inspection = inspect_checkpoint(folder)
    assert inspection.loads == loads, inspection.findings
    json.dumps(inspection.to_dict(), allow_nan=False)
    describe(inspection)


# On the hub


def test_weights_on_the_hub_are_not_downloaded(
    hub: LoopbackHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    shard(folder)
    upload(hub, folder)
    here, there = inspect_checkpoint(folder).to_dict(), inspect_checkpoint("org/model").to_dict()
    weights = [request for request in hub.requests if (request.file or "").endswith(".safetensors")]
    assert [request.file for request in weights] == list(SHARDS)
    assert [request.range for request in weights] == ["bytes=0-100000"] * 2
    for name in SHARDS:
        assert hub.sent_bytes[name] == 100_001 < (folder / name).stat().st_size
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "nothing of the weights is kept"
    different = {key for key in here if here[key] != there[key]}
    assert different == {"name", "folder", "commit"} and there["commit"] == "a" * 40
    assert there["loads"]


def test_a_long_header_takes_a_second_range_and_no_more(hub: LoopbackHub, tmp_path: Path) -> None:
    tensors = {f"tensor.number.{i:05d}": mx.zeros(1) for i in range(2000)} | {"big": mx.zeros(10**6)}
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors)
    (tmp_path / "config.json").write_text("{}")
    upload(hub, tmp_path, "org/long")
    inspection = inspect_checkpoint("org/long")
    assert inspection.weights is not None and inspection.weights.total.tensors == 2001
    first, second = (r.range for r in hub.requests if (r.file or "").endswith(".safetensors"))
    header_bytes = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert (first, second) == ("bytes=0-100000", f"bytes=8-{header_bytes + 7}") and header_bytes > 100_000


def test_weights_in_the_cache_are_not_asked_for_again(hub: LoopbackHub, checkpoint: Path) -> None:
    upload(hub, checkpoint)
    arcee_mlx.load_model("org/model")
    hub.requests.clear()
    assert inspect_checkpoint("org/model").loads
    assert not [name for name in hub.downloads() if name.endswith(".safetensors")]


def test_offline_a_whole_cached_copy_is_inspected_and_no_other(
    hub: LoopbackHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(hub, checkpoint)
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set, and 'org/model' is not in the cache"):
            inspect_checkpoint("org/model")
    inspect_checkpoint("org/model")
    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(HubError, match="lacks model.safetensors"):
            inspect_checkpoint("org/model")
    arcee_mlx.load_model("org/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    inspection = inspect_checkpoint("org/model")
    assert inspection.loads and inspection.commit == "a" * 40 and not hub.requests


@pytest.mark.parametrize(
    ("contents", "error"),
    [
        (
            {"config.json": b'{"model_type": "arcee"}', "pytorch_model.bin": b"x"},
            "holds pytorch_model.bin but no model",
        ),
        ({"model-q4.gguf": b"GGUF", ".gitattributes": b""}, "config: config.json: no such file"),
        ({"model-q4.gguf": b"GGUF", "README.md": b"#"}, "weights: holds model-q4.gguf but no model.safetensors"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b""}, "has no model.safetensors"),
        ({"config.json": b"{}", "model.safetensors": b"\xff" * 99}, "model.safetensors: its header is damaged"),
        ({"config.json": b"{}", "model.safetensors": b"\x02"}, "model.safetensors: its header is damaged"),
        ({"config.json": b"{}", "model.safetensors": b"\x02\0\0\0\0\0\0\0{}"}, "tokenizer.json is missing"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "model-1.safetensors"}}'},
            "model-1.safetensors: no such file",
        ),
    ],
)
def test_an_unusable_repository_is_inspected_too(hub: LoopbackHub, contents: dict[str, bytes], error: str) -> None:
    hub.add("org/model", contents)
    inspection = inspect_checkpoint("org/model")
    assert not inspection.loads and error in texts(inspection, "error")
    assert set(inspection.files) == contents.keys() - {".gitattributes"}


def test_a_file_on_the_hub_that_is_too_short_is_told(hub: LoopbackHub, checkpoint: Path) -> None:
    contents = upload(hub, checkpoint)
    hub.add("org/model", contents | {"model.safetensors": contents["model.safetensors"][:200_000]})
    assert "model.safetensors: is 200000 bytes; expected" in texts(inspect_checkpoint("org/model"), "error")


def test_a_tie_that_only_the_values_decide_is_left_open(hub: LoopbackHub, checkpoint: Path, tmp_path: Path) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    tied()(folder)
    upload(hub, folder)
    inspection = inspect_checkpoint("org/model")
    assert inspection.loads and "whether they are equal shows after the download" in texts(inspection, "note")


def test_refusals_of_the_hub_are_the_same_errors_as_for_loading(hub: LoopbackHub, checkpoint: Path) -> None:
    with pytest.raises(HubError, match="'org/nothing' is missing or private"):
        inspect_checkpoint("org/nothing")
    repo = hub.repos.get("org/model") or hub.add("org/model", {p.name: p.read_bytes() for p in checkpoint.iterdir()})
    with pytest.raises(HubError, match="has no revision 'v9'"):
        inspect_checkpoint("org/model", "v9")
    inspect_checkpoint("org/model")
    repo.file_status = 503  # the small files are cached now: the headers are what is refused
    with pytest.raises(HubError, match=r"is in trouble \(503\)"):
        inspect_checkpoint("org/model")
    repo.file_status, repo.gated = None, True
    with pytest.raises(HubError, match="is gated; .*accept the terms"):
        inspect_checkpoint("org/model")


def test_a_revision_is_what_is_inspected(hub: LoopbackHub, checkpoint: Path) -> None:
    contents = upload(hub, checkpoint)
    hub.add("org/model", contents | {"notes.py": b"x"}, commit="b" * 40, branch="v2")
    inspection = inspect_checkpoint("org/model", "v2")
    assert inspection.commit == "b" * 40 and "notes.py" in inspection.files


# The command


def inspect(*arguments: str) -> int:
    return main(["inspect", *arguments])


def test_the_table_says_it_all_in_lines_that_fit(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert inspect(str(checkpoint)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0] == str(checkpoint) and lines[-1] == "verdict     loads"
    assert max(map(len, lines[1:])) <= 80
    labels = [line.split()[0] for line in lines[2:] if not line.startswith(" ")]
    assert labels == [
        "config", "rope", "context", "weights", "memory", "tokenizer", "template", "generation", "files", "findings",
        "verdict",
    ]  # fmt: skip
    for part in (
        "embedding",
        "attention",
        "mlp",
        "norms",
        "head",
        "all",
        "default",
        "256 positions",
        "model.safetensors",
    ):
        assert part in captured.out


def test_json_is_one_object_with_stable_keys(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(str(checkpoint), "--json") == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == [
        "name", "loads", "folder", "commit", "findings", "config", "weights", "context", "memory", "tokenizer",
        "sampling", "files",
    ]  # fmt: skip
    assert values["loads"] is True and values["weights"]["total"]["bits_per_weight"] == 32
    assert values["files"]["config.json"]["use"] == "config"


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_what_does_not_load_is_status_1_and_still_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert inspect(str(tmp_path), *arguments) == 1
    captured = capsys.readouterr()
    assert captured.err == "" and "config.json: no such file" in captured.out
    if arguments:
        assert json.loads(captured.out)["loads"] is False
    else:
        assert captured.out.splitlines()[-1] == "verdict     does not load (3 errors)"


@pytest.mark.parametrize(
    ("arguments", "kind"), [(("/nonexistent/folder",), CheckpointError), (("a b",), InputError), ((".", "--revision", "x"), InputError)]
)  # fmt: skip
def test_nothing_to_look_at_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], kind: type[ArceeError]
) -> None:
    assert inspect(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    with pytest.raises(kind):
        inspect_checkpoint(arguments[0], arguments[-1] if len(arguments) > 1 else None)


def test_nothing_of_a_checkpoint_reaches_the_terminal_unseen(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy(checkpoint, tmp_path / "copy")
    put("model.\x1b[2J\u202e", mx.zeros(1))(folder)
    change_config(architectures=["ArceeForCausalLM\x07\ud800"])(folder)
    assert inspect(str(folder)) == 1
    table = capsys.readouterr().out
    assert r"model.\x1b[2J\u202e" in table and r"\x07\ud800" in table
    assert all(character.isprintable() or character == "\n" for character in table)
    assert inspect(str(folder), "--json") == 1
    assert json.loads(capsys.readouterr().out)["config"]["architectures"] == ["ArceeForCausalLM\x07\ud800"]


def test_sizes_and_counts_read_as_people_say_them() -> None:
    assert [size_words(n) for n in (0, 999, 1000, 73_728_000, 9_240_000_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "73.73 MB",
        "9.24 GB",
    ]
    assert [count_words(n) for n in (0, 999_999, 1_500_000, 4_619_189_760)] == ["0", "999,999", "1.50 M", "4.62 B"]
    assert math.isclose(arcee_mlx.inspection.results.Amount(tensors=1, parameters=8, size_bytes=4).bits_per_weight, 4)
