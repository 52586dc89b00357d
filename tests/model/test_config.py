"""ArceeConfig: both generations of JSON, completion, and refusals that name what is wrong."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arcee_mlx.errors import ArceeError, CheckpointError, ConfigError
from arcee_mlx.model.config import ROPE_TYPES, ArceeConfig, read_config, read_json

SMALL: dict[str, Any] = {
    "model_type": "arcee", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def small(**changes: Any) -> ArceeConfig:
    return ArceeConfig.from_dict({**SMALL, **changes})


def test_missing_keys_take_arcees_defaults() -> None:
    config = ArceeConfig.from_dict({})
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (32000, 2560, 18432)
    assert (config.num_hidden_layers, config.num_attention_heads, config.kv_heads, config.head_size) == (32, 32, 32, 80)
    assert (config.hidden_act, config.max_position_embeddings, config.rms_norm_eps) == ("relu2", 4096, 1e-5)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (None, 128000, 128001)
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)
    assert config.rope == {"rope_type": "default", "rope_theta": 10000.0}
    assert config.num_labels == 2 and config.dtype is None


def test_the_published_config_of_afm_is_read() -> None:
    scaling = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 20.0, "mscale": 1.0, "original_max_position_embeddings": 4096,
               "rope_type": "yarn", "type": "yarn"}  # fmt: skip
    config = ArceeConfig.from_dict(
        {"architectures": ["ArceeForCausalLM"], "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 20,
         "num_key_value_heads": 4, "head_dim": 128, "max_position_embeddings": 65536, "vocab_size": 128005,
         "rope_scaling": scaling, "rope_theta": 10000.0, "torch_dtype": "bfloat16", "transformers_version": "4.53.2",
         "pad_token_id": 128004, "use_cache": True, "model_type": "arcee"}
    )  # fmt: skip
    assert config.rope == {**scaling, "rope_theta": 10000.0}
    assert config.dtype == "bfloat16"


@pytest.mark.parametrize("beside", [None, {}])
def test_empty_rope_scaling_leaves_rope_parameters_alone(beside: Any) -> None:
    config = small(rope_parameters={"rope_type": "linear", "factor": 2.0}, rope_scaling=beside)
    assert config.rope["factor"] == 2.0


def test_rope_scaling_replaces_rope_parameters_whole() -> None:
    config = small(
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0},
        rope_scaling={"type": "yarn", "factor": 4},
    )
    assert config.rope == {
        "type": "yarn", "rope_type": "yarn", "factor": 4, "rope_theta": 10000.0, "original_max_position_embeddings": 64,
    }  # fmt: skip


@pytest.mark.parametrize("rope", [{"rope_parameters": None}, {"rope_parameters": {}}, {"rope_scaling": None}, {}])
def test_no_rope_at_all_is_plain_rope(rope: dict[str, Any]) -> None:
    assert small(**rope).rope == {"rope_type": "default", "rope_theta": 10000.0}


def test_theta_of_the_rope_dict_beats_the_top_level_which_beats_the_default() -> None:
    assert small(rope_theta=7.0, rope_parameters={"rope_type": "default", "rope_theta": 3.0}).rope["rope_theta"] == 3.0
    assert small(rope_theta=7.0, rope_parameters={"rope_type": "default"}).rope["rope_theta"] == 7.0
    assert small(rope_parameters={"rope_type": "default"}).rope["rope_theta"] == 10000.0


def test_rope_type_beats_type() -> None:
    assert small(rope_scaling={"type": "linear", "rope_type": "dynamic", "factor": 2.0}).rope["rope_type"] == "dynamic"


@pytest.mark.parametrize("rope", [{"rope_type": "yarn", "factor": 2.0}, LLAMA3, LONGROPE], ids=lambda r: r["rope_type"])
def test_original_length_of_the_top_level_wins_then_the_dicts_then_the_maximum(rope: dict[str, Any]) -> None:
    key = "original_max_position_embeddings"
    assert small(rope_parameters={**rope, key: 16}, **{key: 8}).rope[key] == 8
    assert small(rope_parameters={**rope, key: 16}).rope[key] == 16
    assert small(rope_parameters=rope).rope[key] == 64


def test_original_length_of_the_top_level_means_nothing_to_other_types() -> None:
    config = small(rope_parameters={"rope_type": "linear", "factor": 2.0}, original_max_position_embeddings=8)
    assert "original_max_position_embeddings" not in config.rope


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_missing_factor_is_refused_by_name(kind: str) -> None:
    rope = {key: value for key, value in LLAMA3.items() if key != "factor"}
    with pytest.raises(ConfigError, match=r"rope_parameters\.factor.*expected.*" + kind):
        small(rope_parameters={**rope, "rope_type": kind})


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "proportional"])
def test_null_factor_is_refused_but_for_yarn_and_longrope(kind: str) -> None:
    with pytest.raises(ConfigError, match="factor"):
        small(rope_parameters={**LLAMA3, "rope_type": kind, "factor": None})
    assert small(rope_parameters={"rope_type": "yarn", "factor": None}).rope["factor"] is None
    assert small(rope_parameters={**LONGROPE, "factor": None}).rope["factor"] is None


@pytest.mark.parametrize("kind", ["su", "mrope", "axial", "deepseek_yarn", "ntk", "", None, 3, ["yarn"]])
def test_unknown_rope_type_is_refused_with_the_known_ones(kind: Any) -> None:
    with pytest.raises(ConfigError, match="rope_type.*expected one of default, linear"):
        small(rope_scaling={"type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": None},
        {"rope_type": "yarn", "factor": 2.0, "low_freq_factor": None},
        {"rope_type": "default", "factor": None, "partial_rotary_factor": None},
    ],
    ids=str,
)
def test_nulls_that_the_type_does_not_read_do_no_harm(rope: dict[str, Any]) -> None:
    assert small(rope_parameters=rope).rope["rope_type"] == rope["rope_type"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 16), ("attn_logit_softcapping", 30.0), ("final_logit_softcapping", 30.0), ("num_experts", 8),
        ("embedding_multiplier", 12.0), ("logits_scaling", 8.0), ("residual_multiplier", 0.2), ("use_qk_norm", True),
        ("rope_interleave", True), ("is_causal", False), ("per_layer_config", {"0": {"head_dim": 4}}),
        ("no_rope_layers", [0, 1]), ("layer_types", ["full_attention", "sliding_attention"]), ("attention_multiplier", 0.1),
    ],
)  # fmt: skip
def test_key_of_another_decoder_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=key):
        small(**{key: value})


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": None}, {"sliding_window": 64}, {"layer_types": ["full_attention"] * 2}, {"is_causal": True},
        {"num_experts": 0}, {"logit_scale": 1.0}, {"no_rope_layers": []}, {"pretraining_tp": 1}, {"_name_or_path": "x"},
        {"auto_map": {"AutoConfig": "x.py"}}, {"some_future_key": [1]}, {"transformers_version": "9"}, {"per_layer_config": None},
    ],
    ids=str,
)  # fmt: skip
def test_harmless_key_passes(changes: dict[str, Any]) -> None:
    assert small(**changes) == small()


def test_quantization_of_another_library_is_refused_and_mlx_quantization_is_kept() -> None:
    table = {"group_size": 64, "bits": 4, "mode": "affine"}
    with pytest.raises(ConfigError, match="quantization_config is .*'gptq'"):
        small(quantization_config={"quant_method": "gptq", "bits": 4})
    assert small(quantization=table, quantization_config={**table, "quant_method": "mlx"}).quantization == table


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", None), ("vocab_size", "40"), ("vocab_size", 40.0), ("vocab_size", True), ("vocab_size", 0),
        ("hidden_size", -32), ("num_hidden_layers", -1), ("num_attention_heads", None), ("max_position_embeddings", None),
        ("num_key_value_heads", 0), ("num_key_value_heads", 3), ("num_attention_heads", 3), ("head_dim", 7), ("head_dim", 0),
        ("rms_norm_eps", None), ("rms_norm_eps", "1e-5"), ("attention_dropout", None), ("tie_word_embeddings", None),
        ("attention_bias", 1), ("mlp_bias", "true"), ("hidden_act", "swiglu"), ("hidden_act", None), ("hidden_act", ["relu2"]),
        ("eos_token_id", "2"), ("eos_token_id", [1, "2"]), ("bos_token_id", 1.0), ("pad_token_id", 40), ("pad_token_id", -41),
        ("dtype", "float8"), ("torch_dtype", 5), ("rope_parameters", 5), ("rope_parameters", "yarn"),
        ("rope_theta", None), ("rope_theta", "1e4"), ("quantization_config", "int4"), ("quantization", 4), ("layer_types", 5),
        ("id2label", ["a", "b"]), ("id2label", {"a": "b"}), ("num_labels", "3"), ("num_labels", -1),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_value_is_refused_by_name_and_source(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name.removeprefix("torch_")) as error:
        ArceeConfig.from_dict({**SMALL, name: value}, source="some/config.json")
    assert str(error.value).startswith("some/config.json: ")


def test_window_beside_a_missing_length_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        small(sliding_window=4, max_position_embeddings=None)


def test_other_model_types_are_refused() -> None:
    with pytest.raises(ConfigError, match="model_type 'llama'; expected 'arcee'"):
        small(model_type="llama")


def test_number_of_labels_comes_from_id2label_then_num_labels_then_two() -> None:
    assert small().num_labels == 2
    assert small(num_labels=5).num_labels == 5
    assert small(id2label={"0": "a", "1": "b", "2": "c"}, num_labels=5).num_labels == 3
    assert small(id2label={"0": "a", "1": "b"}).id2label == {0: "a", 1: "b"}
    with pytest.raises(ConfigError, match="problem_type"):
        small(id2label={"0": "a"}, problem_type="single_label_classification")


def test_dtype_beats_torch_dtype() -> None:
    assert small(dtype="bfloat16", torch_dtype="float16").dtype == "bfloat16"
    assert small(dtype=None, torch_dtype="torch.float16").dtype == "float16"
    assert small(torch_dtype=None).dtype is None


@pytest.mark.parametrize("pad", [0, 39, -1, -40, None])
def test_pad_id_inside_the_vocabulary_is_kept(pad: int | None) -> None:
    assert small(pad_token_id=pad).pad_token_id == pad


def test_reading_changes_nothing_of_the_callers() -> None:
    values = {**SMALL, "rope_scaling": {"type": "yarn", "factor": 2.0}, "id2label": {"0": "x"}}
    before = json.dumps(values)
    config = ArceeConfig.from_dict(values)
    config.rope["factor"] = 9.0
    assert json.dumps(values) == before


def test_config_is_frozen_and_can_be_varied() -> None:
    config = small(rope_scaling={"type": "yarn", "factor": 2.0})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]
    assert dataclasses.replace(config, num_hidden_layers=1).rope == config.rope


ROPES = st.sampled_from(
    [
        {}, {"rope_type": "linear", "factor": 2.0}, {"type": "yarn", "factor": None, "beta_fast": None}, LLAMA3, LONGROPE,
        {"rope_type": "proportional", "partial_rotary_factor": 0.5}, {"rope_type": "dynamic", "factor": math.inf},
    ]
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "rope_parameters": ROPES, "rope_scaling": ROPES, "rope_theta": st.sampled_from([1e4, 5e5]),
            "dtype": st.sampled_from(["float16", None]), "torch_dtype": st.sampled_from(["bfloat16", None]),
            "id2label": st.sampled_from([None, {"0": "a", "1": "b", "2": "c"}]), "num_labels": st.integers(1, 4),
            "eos_token_id": st.sampled_from([None, 2, [2, 3]]), "tie_word_embeddings": st.booleans(),
            "quantization": st.sampled_from([None, {"group_size": 32, "bits": 4}]), "problem_type": st.just("regression"),
            "architectures": st.just(["ArceeModel"]), "num_key_value_heads": st.sampled_from([None, 1, 4]),
        },
    )
)  # fmt: skip
def test_config_survives_its_own_json(changes: dict[str, Any]) -> None:
    config = small(**changes)
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert ArceeConfig.from_dict(json.loads(text)) == config


def test_special_floats_are_read_and_written_as_transformers_does() -> None:
    config = small(rope_parameters={"rope_type": "linear", "factor": {"__float__": "Infinity"}})
    assert config.rope["factor"] == math.inf
    assert config.to_dict()["rope_parameters"]["factor"] == {"__float__": "Infinity"}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_odd_heads_are_refused_for_every_rope_type(kind: str) -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        small(head_dim=7, rope_parameters={**LLAMA3, **LONGROPE, "rope_type": kind})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "expected JSON"), (b"", "expected JSON"), (b"\xff\xfe", "expected JSON"), (b"[1]", "expected a JSON object"),
        (b"null", "expected a JSON object"), (b"[" * 200_000, "expected JSON"), (b'{"a": ' + b"9" * 5000 + b"}", "expected JSON"),
    ],
    ids=["open", "empty", "not_utf8", "list", "null", "deep", "long_number"],
)  # fmt: skip
def test_damaged_json_is_a_checkpoint_error_that_names_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_missing_config_and_wrong_config_name_their_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "hidden_act": "x"}))
    with pytest.raises(ConfigError, match="hidden_act") as error:
        read_config(tmp_path)
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert isinstance(error.value, ArceeError) and isinstance(error.value, ValueError)
