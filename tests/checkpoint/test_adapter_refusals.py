"""What is said of an adapter that does not fit the model or cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arcee_mlx import set_adapter
from arcee_mlx.errors import ArceeError, CheckpointError, ConfigError

from adapter_data import make_base, write_mlx_lm, write_peft


def change(name: str, array: np.ndarray | None, file: str = "adapters.safetensors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
        save_file(tensors, folder / file)

    return damage


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (change(f"{Q}.lora_b", None), ["adapters.safetensors", f"{Q}.lora_b", "(4, 128)"]),
        (change(f"{Q}.lora_a", np.zeros((64, 5), np.float32)), ["adapters.safetensors", f"{Q}.lora_a", "(64, 5)", "(64, 4)"]),
        (change("model.layers.7.x.lora_a", np.zeros((2, 3), np.float32)), ["model.layers.7.x.lora_a", "(2, 3)", "adapters.safetensors"]),
        (change(f"{Q}.lora_a", np.zeros((64, 4), np.uint8)), [f"{Q}.lora_a", "U8", "F32"]),
    ],
    ids=["missing", "mis-shaped", "unexpected", "integers"],
)  # fmt: skip
def test_a_mismatch_names_file_tensor_and_both_sides(
    tmp_path: Path, damage: Callable[[Path], None], parts: list[str]
) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        set_adapter(make_base(), folder)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "array", "parts"),
    [
        (f"{Q}.lora_B.weight", None, [f"{Q}.lora_B.weight", "(128, 4)"]),
        (f"{Q}.lora_A.weight", np.zeros((8, 64), np.float32), [f"{Q}.lora_A.weight", "(8, 64)", "(4, 64)"]),
        (f"{Q}.lora_B.bias", np.zeros(128, np.float32), [f"{Q}.lora_B.bias", "(128,)"]),
        ("model.embed_tokens.weight", np.zeros((402, 64), np.float32), ["model.embed_tokens.weight", "(402, 64)", "(400, 64)"]),
    ],
    ids=["missing", "mis-shaped", "unexpected", "larger vocabulary"],
)  # fmt: skip
def test_a_mismatch_of_peft_names_file_tensor_and_both_sides(
    tmp_path: Path, name: str, array: np.ndarray | None, parts: list[str]
) -> None:
    folder = write_peft(tmp_path / "a")
    change(f"base_model.model.{name}", array, "adapter_model.safetensors")(folder)
    with pytest.raises(CheckpointError) as error:
        set_adapter(make_base(), folder)
    for part in ["adapter_model.safetensors", *parts]:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; expected 'LORA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is \[1, 2\]"),
        ({"target_parameters": ["up_proj.weight"]}, "target_parameters is"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"use_qalora": True}, "use_qalora is True"),
        ({"something_new": {"a": 1}}, "something_new is"),
        ({"bias": "some"}, "bias is 'some'; expected none, all or lora_only"),
        ({"r": 0}, "r is 0; expected a positive integer"),
        ({"lora_alpha": "16"}, "lora_alpha is '16'; expected a number"),
        ({"use_dora": 1}, "use_dora is 1; expected true or false"),
        ({"target_modules": "(q_proj"}, "target_modules is '.q_proj'; expected a regular expression, or a list"),
        ({"target_modules": [1]}, "target_modules is"),
        ({"target_modules": ["no_such"]}, "targets no layer of this model"),
        ({"target_modules": None}, "targets no layer of this model"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern is"),
        ({"lora_dropout": 1}, "lora_dropout is 1; expected 0 up to"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
        ({"use_dora": True, "target_modules": ["embed_tokens"]}, "use_dora with 'model.embed_tokens'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_peft_can_and_this_cannot_is_refused_by_name(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = write_peft(tmp_path / "a", **config)
    with pytest.raises(ConfigError, match=message) as error:
        set_adapter(make_base(), folder)
    assert str(folder / "adapter_config.json") in str(error.value)


@pytest.mark.parametrize("config", [{"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head", "q_proj"]},
                                    {"modules_to_save": ["lm_head"]}, {"target_modules": r".*(_proj|head)"}], ids=str)  # fmt: skip
def test_half_of_a_tied_embedding_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = write_peft(tmp_path / "a", **config)
    with pytest.raises(ConfigError, match="embedding and head are one in this model"):
        set_adapter(make_base(tie_word_embeddings=True), folder)
    set_adapter(make_base(tie_word_embeddings=True), write_peft(tmp_path / "b"))
    change("base_model.model.lm_head.weight", np.zeros((400, 64), np.float32), "adapter_model.safetensors")(
        tmp_path / "b"
    )
    with pytest.raises(CheckpointError, match=r"holds 'base_model.model.lm_head.weight' of shape \(400, 64\)"):
        set_adapter(make_base(tie_word_embeddings=True), tmp_path / "b")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fine_tune_type": "oft"}, "fine_tune_type is 'oft'; expected one of lora, dora, full"),
        ({"num_layers": None}, "num_layers is None; expected the number of layers"),
        ({"lora_parameters": None}, "lora_parameters is None; expected an object"),
        ({"lora_parameters": {"rank": 4, "alpha": 8}}, "scale is None; expected a number"),
        ({"lora_parameters": {"rank": 4.5, "scale": 8}}, "rank is 4.5; expected a positive integer"),
        ({"lora_parameters": {"rank": 4, "scale": 8, "keys": "q_proj"}}, "keys is 'q_proj'; expected a list of names"),
        ({"lora_parameters": {"rank": 4, "scale": 8, "keys": ["q_proj"]}}, "targets no layer of this model"),
    ],
    ids=str,
)  # fmt: skip
def test_a_malformed_config_of_mlx_lm_is_named(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    folder = write_mlx_lm(tmp_path / "a")
    values = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=message) as error:
        set_adapter(make_base(), folder)
    assert str(folder / "adapter_config.json") in str(error.value)


def test_dora_on_a_quantized_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_mlx_lm(tmp_path / "a", kind="dora", keys=["model.embed_tokens"])
    with pytest.raises(ConfigError, match="DoRA on 'model.embed_tokens', which is quantized"):
        set_adapter(make_base(4), folder)


def test_folders_that_are_no_adapters_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(ArceeError) as error:
            set_adapter(make_base(), folder)
        return str(error.value)

    assert "no such folder" in refused(tmp_path / "nowhere")
    assert "adapter_config.json: no such file" in refused(checkpoint)
    folder = write_peft(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "holds adapter_model.bin but no adapter_model.safetensors" in refused(folder)
    (folder / "adapter_config.json").write_text('{"model_type": "arcee"}')
    assert "neither peft_type nor fine_tune_type" in refused(folder)
    (folder / "adapter_config.json").write_text("{")
    assert "cannot be read" in refused(folder)
    truncated = write_mlx_lm(tmp_path / "b")
    data = (truncated / "adapters.safetensors").read_bytes()
    (truncated / "adapters.safetensors").write_bytes(data[:-9])
    assert "adapters.safetensors: is" in refused(truncated)
