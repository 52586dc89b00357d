"""inspect_checkpoint: true numbers, here and on the hub, and no weight read or downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from huggingface_hub import constants
from mlx.utils import tree_flatten

import arcee_mlx
from arcee_mlx import ArceeForCausalLM, ArceeModel, HubError, inspect_checkpoint, load, load_model, save_checkpoint
from arcee_mlx.checkpoint import files
from arcee_mlx.inspection.command import describe

from checkpoint_changes import SHARDS, copy, drop, shard, texts, tied, upload
from conftest import tiny_config, write_checkpoint, write_tokenizer
from loopback_hub import LoopbackHub

YARN = {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096, "rope_theta": 10000.0}


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


def test_a_group_size_of_null_is_the_modes_own_as_in_mlx_lms_mixed_recipes(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "float")
    parameters = sum(value.size for _, value in tree_flatten(model.parameters()))
    nn.quantize(model, group_size=64, bits=6)
    save_checkpoint(model, tmp_path / "quantized")
    values = json.loads((tmp_path / "quantized/config.json").read_text())
    layers = [path for path, layer in model.named_modules() if hasattr(layer, "bits")]
    own = {"group_size": None, "bits": 6, "mode": "affine"}
    values["quantization"] = {"group_size": 64, "bits": 4, "mode": "affine"} | dict.fromkeys(layers, own)
    (tmp_path / "quantized/config.json").write_text(json.dumps(values))
    weights = inspect_checkpoint(tmp_path / "quantized").weights
    assert weights is not None and weights.total.parameters == parameters
    assert set(weights.forms) == {"F32", "6 bits in groups of 64"}


def test_a_decoder_without_head_is_one_and_needs_no_tokenizer(tmp_path: Path) -> None:
    save_checkpoint(ArceeModel(tiny_config()), tmp_path / "base")
    inspection = inspect_checkpoint(tmp_path / "base")
    assert inspection.loads and "head" not in inspection.weights.parts  # type: ignore[union-attr]
    assert "tokenizer.json is missing" in texts(inspection, "warning")
    load_model(tmp_path / "base")


@pytest.mark.parametrize(
    "name", ["ArceeForSequenceClassification", "ArceeForTokenClassification", "ArceeForQuestionAnswering"]
)
def test_a_classifier_loads_and_a_missing_head_is_named(tmp_path: Path, name: str) -> None:
    save_checkpoint(getattr(arcee_mlx, name)(tiny_config(id2label={0: "no", 1: "yes", 2: "?"})), tmp_path / "x")
    inspection = inspect_checkpoint(tmp_path / "x")
    assert inspection.loads and inspection.weights is not None and inspection.weights.parts["head"].tensors in (1, 2)
    words = "first and the last token" if name == "ArceeForQuestionAnswering" else "a head of 3 labels (no, yes, ?)"
    assert words in " ".join(describe(inspection, width=120).split())
    key = "qa_outputs.weight" if name == "ArceeForQuestionAnswering" else "score.weight"
    drop(key)(tmp_path / "x")
    inspection = inspect_checkpoint(tmp_path / "x")
    assert not inspection.loads and f"missing: {key}" in texts(inspection, "error")
    assert "the head cannot be made up" in texts(inspection, "error")


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
