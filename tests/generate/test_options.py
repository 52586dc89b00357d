"""What may be asked of a generation, and what is refused by name."""

from __future__ import annotations

import math

import pytest

from arcee_mlx import GenerateOptions, InputError
from arcee_mlx.generate.options import DEFAULT_MAX_TOKENS, context_tokens

from conftest import tiny_config

BAD = {
    "max_tokens": [0, -2, 1.5, True, "10"],
    "temp": [-1, -0.001, math.nan, math.inf, "hot", True],
    "top_k": [-1, 2.5, True],
    "top_p": [0, -0.1, 1.01, math.nan],
    "min_p": [-0.1, 1.01, math.inf],
    "repetition_penalty": [0, -1, math.nan],
    "seed": [-1, 2**64, 1.0],
    "prefill_step_size": [0, -5],
    "max_kv_size": [0, 4],
    "kv_bits": [0, 1, 3, 5, 16],
    "kv_group_size": [0, 16, 48],
    "stop": [("",), (1,), ("a", "")],
    "extra_eos_tokens": ["text", (None,)],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"^{name} is .*; expected "):
        GenerateOptions(**{name: value})  # type: ignore[arg-type]


def test_a_rotating_cache_cannot_be_quantized() -> None:
    with pytest.raises(InputError, match="kv_bits together with max_kv_size"):
        GenerateOptions(kv_bits=8, max_kv_size=64)


def test_one_stop_string_may_stand_alone() -> None:
    assert GenerateOptions(stop="\n\n").stop == ("\n\n",)  # type: ignore[arg-type]


def test_the_caller_comes_before_generation_config_and_that_before_the_defaults() -> None:
    theirs = {"do_sample": True, "temperature": 0.5, "top_p": 0.95, "repetition_penalty": 1.1, "max_new_tokens": 7}
    resolved = GenerateOptions(top_p=0.5).resolve(theirs, tiny_config())
    assert (resolved.temp, resolved.top_p, resolved.top_k) == (0.5, 0.5, 50)
    assert (resolved.repetition_penalty, resolved.min_p, resolved.max_tokens) == (1.1, 0.0, 7)
    plain = GenerateOptions().resolve({}, tiny_config())
    assert (plain.temp, plain.top_k, plain.top_p, plain.max_tokens) == (0.0, 0, 1.0, DEFAULT_MAX_TOKENS)


def test_without_do_sample_the_temperature_of_generation_config_does_not_count() -> None:
    assert GenerateOptions().resolve({"temperature": 0.7, "do_sample": False}, tiny_config()).temp == 0
    assert GenerateOptions(temp=0.9).resolve({"temperature": 0.7}, tiny_config()).temp == 0.9


def test_a_bad_generation_config_is_named() -> None:
    with pytest.raises(InputError, match=r"generation_config.json: top_p is 3"):
        GenerateOptions().resolve({"do_sample": True, "top_p": 3}, tiny_config())


def test_a_kv_group_must_fit_the_head() -> None:
    options = GenerateOptions(kv_bits=4, kv_group_size=64)
    with pytest.raises(InputError, match="kv_group_size is 64; expected a divisor of the model's head_dim 32"):
        options.resolve({}, tiny_config())


def test_dynamic_rope_stretches_the_context_and_no_other_does() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert context_tokens(tiny_config(rope_parameters=dynamic)) == 512
    assert context_tokens(tiny_config(rope_parameters=yarn)) == 256
