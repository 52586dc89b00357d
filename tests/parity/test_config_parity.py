"""ArceeConfig reads, completes and refuses exactly what transformers' ArceeConfig and rotary embedding do."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

from transformers.activations import ACT2FN  # noqa: E402
from transformers.models.arcee.modeling_arcee import ArceeRotaryEmbedding  # noqa: E402

from arcee_mlx.errors import ConfigError  # noqa: E402
from arcee_mlx.model.activations import ACTIVATIONS  # noqa: E402
from arcee_mlx.model.config import ACTIVATIONS as OUR_ACTIVATIONS  # noqa: E402
from arcee_mlx.model.config import ArceeConfig, read_config  # noqa: E402
from arcee_mlx.model.decoder import ArceeForCausalLM  # noqa: E402

from reference import TheirCausalLM, TheirConfig, tiny  # noqa: E402

pytestmark = pytest.mark.parity
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 16}  # fmt: skip


def theirs(values: dict[str, Any]) -> tuple[Any, Any] | None:
    """transformers' config and rotary embedding, or None if it cannot run the model."""
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            config = TheirConfig.from_dict(json.loads(json.dumps(values)))
            TheirCausalLM(config).eval()(torch.tensor([[3, 4, 5]]), use_cache=False)
            return config, ArceeRotaryEmbedding(config)
    except Exception:
        return None


def ours(values: dict[str, Any]) -> ArceeForCausalLM | None:
    """Our model, or None if the config is refused; any other error is a bug and comes through."""
    try:
        model = ArceeForCausalLM(ArceeConfig.from_dict(json.loads(json.dumps(values))))
        mx.eval(model(mx.array([[3, 4, 5]])))
    except ConfigError:
        return None
    return model


def assert_same_verdict(values: dict[str, Any]) -> None:
    reference, model = theirs(values), ours(values)
    assert (model is None) == (reference is None), f"transformers {'refuses' if reference is None else 'runs'} {values}"
    if reference is None or model is None:
        return
    config, rotary = reference
    got = model.model.rotary_emb
    assert got.kind == config.rope_parameters["rope_type"]
    assert got.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    np.testing.assert_allclose(np.array(got.base_table), rotary.original_inv_freq.numpy(), rtol=3e-7, atol=1e-30)


NUMBERS = st.sampled_from([0.25, 0.5, 1, 1.0, 1.5, 2, 4.0, 8])
OPTIONAL = {
    "rope_theta": st.sampled_from([10000.0, 10000, 500000.0, 1e6]),
    "factor": NUMBERS | st.none(),
    "partial_rotary_factor": st.sampled_from([0.25, 0.5, 0.875, 0.9, 1, 1.0, None]),
    "original_max_position_embeddings": st.sampled_from([8, 16, 32, 64, None]),
    "attention_factor": st.sampled_from([0.0, 0.5, 1.0, 1.3, None]),
    "beta_fast": st.sampled_from([0, 16, 32.0, None]),
    "beta_slow": st.sampled_from([0, 1, 2.0, None]),
    "mscale": st.sampled_from([0, 0.7, 1.0, None]),
    "mscale_all_dim": st.sampled_from([0.0, 0.5, 1.0, None]),
    "truncate": st.sampled_from([True, False, None]),
    "low_freq_factor": st.sampled_from([1, 1.0, 2.0]),
    "high_freq_factor": st.sampled_from([4, 4.0, 8.0]),
    "short_factor": st.sampled_from([[1.0, 1.1, 1.2, 1.3], [1, 2, 3, 4], [1.0] * 3, [1.5]]),
    "long_factor": st.sampled_from([[2.0, 2.5, 3.0, 4.0], [1, 2, 3, 4], [2.0] * 5, [2]]),
}
NEEDED = {"linear": ["factor"], "dynamic": ["factor"], "yarn": ["factor"],
          "llama3": ["factor", "low_freq_factor", "high_freq_factor"], "longrope": ["short_factor", "long_factor"]}  # fmt: skip


@st.composite
def rope_configs(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(
        st.sampled_from(["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "su", "mrope"])
    )
    keys = set(draw(st.lists(st.sampled_from(sorted(OPTIONAL)), max_size=5)))
    if draw(st.integers(0, 9)) < 8:
        keys |= set(NEEDED.get(kind, []))
    rope = {key: draw(OPTIONAL[key]) for key in sorted(keys)}
    rope |= draw(st.sampled_from([{"rope_type": kind}, {"type": kind}, {"type": "default", "rope_type": kind}, {}]))
    values = tiny(**SMALL)
    place = draw(st.sampled_from(["rope_parameters", "rope_scaling", "both", "empty beside", "null beside"]))
    if place in ("rope_parameters", "empty beside", "null beside"):
        values["rope_parameters"] = rope
    if place in ("rope_scaling", "both"):
        values["rope_scaling"] = rope
    if place == "both":
        values["rope_parameters"] = {"rope_type": "linear", "factor": 3.0, "rope_theta": 77.0}
    if place == "empty beside":
        values["rope_scaling"] = {}
    if place == "null beside":
        values["rope_scaling"] = None
    if draw(st.booleans()):
        values["rope_theta"] = draw(st.sampled_from([5000.0, 20000, None]))
    if draw(st.integers(0, 3)) == 0:
        values["original_max_position_embeddings"] = draw(st.sampled_from([16, 32, None]))
    if draw(st.integers(0, 4)) == 0:
        values["partial_rotary_factor"] = draw(st.sampled_from([0.5, 0.9, 1.0, None]))
    return values


@settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(rope_configs())
def test_random_rope_dicts_are_accepted_and_computed_as_transformers_does(values: dict[str, Any]) -> None:
    assert_same_verdict(values)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "partial_rotary_factor": None},
        {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": None},
        {"rope_type": "linear", "factor": 2.0, "beta_fast": "x"},
        {"rope_type": "yarn", "factor": 2.0, "low_freq_factor": None},
        {"rope_type": "default", "rope_theta": 10_000_000_000},
        {"rope_type": "dynamic", "factor": 2, "rope_theta": 10_000_000_000},
        {"rope_type": "default", "rope_theta": None},
        {"rope_type": "default", "rope_theta": "10000"},
        {"rope_type": None},
        {"type": None},
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": None},
        {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 16},
        {"rope_type": "yarn"},
        {"rope_type": "dynamic", "factor": None},
        {"rope_type": "proportional", "partial_rotary_factor": 0.5},
        {"rope_type": "proportional", "partial_rotary_factor": 0.0},
        {"rope_type": "proportional", "factor": 4.0},
        {"rope_type": "proportional", "factor": None},
        {"rope_type": "proportional", "partial_rotary_factor": 1.5},
        {"rope_type": "proportional", "partial_rotary_factor": None},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": None, "high_freq_factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 0},
        {"rope_type": "axial"},
        {"rope_type": "deepseek_yarn", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": 0.5},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
         "original_max_position_embeddings": 1, "attention_factor": 1.2},
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0,
         "original_max_position_embeddings": 1},
        {"rope_type": "longrope", "short_factor": None, "long_factor": [2.0] * 4},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": float("nan")},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": -1.0},
        {"full_attention": {"rope_type": "linear", "factor": 2.0}},
        {},
    ],
    ids=str,
)  # fmt: skip
def test_rope_corner_is_accepted_or_refused_as_transformers_does(rope: dict[str, Any]) -> None:
    assert_same_verdict(tiny(**SMALL, rope_parameters=rope))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": None},
        {"head_dim": None},
        {"head_dim": 7},
        {"num_attention_heads": 3},
        {"num_key_value_heads": 3, "num_attention_heads": 4, "head_dim": 4},
        {"hidden_act": "no_such_thing"},
        {"hidden_act": None},
        {"vocab_size": None},
        {"vocab_size": "16"},
        {"rms_norm_eps": "1e-5"},
        {"attention_bias": None},
        {"mlp_bias": 1},
        {"tie_word_embeddings": None},
        {"pad_token_id": 15},
        {"pad_token_id": 16},
        {"pad_token_id": -1},
        {"pad_token_id": -17},
        {"eos_token_id": [1, 2]},
        {"eos_token_id": "2"},
        {"eos_token_id": None},
        {"num_labels": 3},
        {"id2label": {"0": "a"}, "problem_type": "single_label_classification"},
        {"id2label": {"0": "a"}, "problem_type": "regression"},
        {"problem_type": "no_such_problem"},
        {"dtype": "bfloat16"},
        {"torch_dtype": "float16"},
        {"dtype": "no_such_dtype"},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5}, "head_dim": 2},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "head_dim": 2},
        {"some_future_key": 5},
        {"attention_dropout": 0},
        {"use_cache": False},
    ],
    ids=str,
)
def test_field_is_accepted_or_refused_as_transformers_does(changes: dict[str, Any]) -> None:
    assert_same_verdict(tiny(**{**SMALL, **changes}))


def test_defaults_are_transformers_defaults() -> None:
    mine, reference = ArceeConfig.from_dict({}), TheirConfig()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range",
                 "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
                 "attention_bias", "attention_dropout", "mlp_bias", "num_labels", "rope_parameters"):  # fmt: skip
        assert getattr(mine, name) == getattr(reference, name), name


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 77.0},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0},
        {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "linear", "factor": math.inf},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_config_survives_the_way_through_transformers_and_back(tmp_path: Path, rope: dict[str, Any], form: str) -> None:
    values = tiny(**SMALL, rms_norm_eps=1e-6, dtype="bfloat16", id2label={"0": "a", "1": "b", "2": "c"}, **{form: rope})
    mine = ArceeConfig.from_dict(json.loads(json.dumps(values)))
    TheirConfig.from_dict(json.loads(json.dumps(values))).save_pretrained(tmp_path)
    assert read_config(tmp_path).rope_parameters == mine.rope_parameters
    assert read_config(tmp_path).num_labels == 3
    (tmp_path / "config.json").write_text(json.dumps(mine.to_dict()))
    back = TheirConfig.from_pretrained(tmp_path)
    assert back.rope_parameters == mine.rope_parameters
    assert back.rms_norm_eps == mine.rms_norm_eps
    assert str(back.dtype) == "torch.bfloat16"
    assert back.num_labels == 3


@pytest.mark.parametrize("name", OUR_ACTIVATIONS)
def test_activation_is_transformers_activation(name: str) -> None:
    points = np.concatenate([np.linspace(-12, 12, 4001), [0.0, -0.0]]).astype(np.float32)
    expected = ACT2FN[name](torch.tensor(points)).numpy()
    np.testing.assert_allclose(np.array(ACTIVATIONS[name](mx.array(points))), expected, atol=3e-6, rtol=2e-6)
