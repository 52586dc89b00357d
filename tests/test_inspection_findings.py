"""What inspect_checkpoint finds: every problem named, whether it keeps the checkpoint from loading or not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import arcee_mlx
from arcee_mlx import ArceeError, inspect_checkpoint, load, load_model
from arcee_mlx.checkpoint import files
from arcee_mlx.inspection.command import describe
from arcee_mlx.model.config import ROPE_TYPES

from checkpoint_changes import SHARDS, change_config, change_json, change_tensors, copy, drop, put, shard, texts, tied
from conftest import CHAT_TEMPLATE


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
