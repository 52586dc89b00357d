"""The seven rotation tables against plain float64 formulas, the length-dependent ones' state, and turning itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx.errors import ConfigError
from arcee_mlx.model.config import ArceeConfig
from arcee_mlx.model.rope import RotaryEmbedding, rotate

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1 + i / 8 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 16,
    },
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "proportional": {"partial_rotary_factor": 0.5},
}


def embedding(kind: str, head_dim: int = 16, length: int = 64, **changes: Any) -> RotaryEmbedding:
    rope = {"rope_type": kind, **KINDS[kind], **changes}
    rope = {key: value for key, value in rope.items() if value != "absent"}
    return RotaryEmbedding(
        ArceeConfig(
            hidden_size=32,
            num_attention_heads=2,
            head_dim=head_dim,
            max_position_embeddings=length,
            rope_parameters=rope,
        )
    )


def oracle(kind: str, D: int = 16, length: int = 64, tokens: int = 0, theta: float = 1e4) -> np.ndarray:
    """float64 frequencies by the papers' formulas."""
    options = KINDS[kind]
    exponents = np.arange(0, D, 2) / D
    plain = theta**-exponents
    if kind == "linear":
        return plain / options["factor"]
    if kind == "dynamic" and tokens > length:
        return (theta * (options["factor"] * tokens / length - (options["factor"] - 1)) ** (D / (D - 2))) ** -exponents
    if kind == "yarn":
        low, high = (D * math.log(16 / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), D - 1)
        ramp = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
        return plain / options["factor"] * ramp + plain * (1 - ramp)
    if kind == "longrope":
        return plain / np.array(options["long_factor" if tokens > 16 else "short_factor"])
    if kind == "llama3":
        turns = 16 * plain / (2 * math.pi)  # rotations within the original length
        smooth = np.clip((turns - 1) / 3, 0, 1)
        return plain * (smooth + (1 - smooth) / options["factor"])
    if kind == "proportional":
        return np.where(np.arange(D // 2) < 4, plain, 0)
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_the_formulas(kind: str) -> None:
    np.testing.assert_allclose(np.array(embedding(kind).base_table), oracle(kind), rtol=1e-6)
    assert embedding(kind).base_table.dtype == mx.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 16, 17, 64, 65, 66, 500])
def test_table_of_a_length_is_the_formulas_at_that_length(kind: str, tokens: int) -> None:
    rope = embedding(kind)
    np.testing.assert_allclose(np.array(rope.table(tokens)), oracle(kind, tokens=tokens), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_share_a_table_exactly_where_all_between_have_it(kind: str) -> None:
    rope = embedding(kind, length=20)
    for first, last in itertools.combinations_with_replacement(range(10, 30), 2):
        tables = [rope.table(length).tolist() for length in (first, last)]
        assert rope.shares_table(first, last) == (tables[0] == tables[1])


@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_rows_are_the_tables_of_their_lengths(kind: str) -> None:
    rope = embedding(kind)
    lengths = [3, 200, 64, 65, 17, -4, 0]
    tables = np.array(rope.table(mx.array(lengths)))
    for row, length in enumerate(lengths):
        table = tables[row] if tables.ndim == 2 else tables
        np.testing.assert_array_equal(table, np.array(rope.table(length)))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_table_has_no_memory_and_forward_leaves_none_in_it(kind: str) -> None:
    rope, fresh = embedding(kind), embedding(kind)
    for length in (500, 70, 3, 64, 90):
        rope.forward_table(length)
        for other in (5, 66, 300):
            np.testing.assert_array_equal(np.array(rope.table(other)), np.array(fresh.table(other)))
    rope.table(1000)
    np.testing.assert_array_equal(
        np.array(rope.forward_table(80)), np.array(rope.table(90 if kind == "dynamic" else 80))
    )


def test_dynamic_forward_grows_stays_and_is_set_back() -> None:
    rope = embedding("dynamic")

    def at(length: int, expected: int) -> None:
        np.testing.assert_allclose(np.array(rope.forward_table(length)), oracle("dynamic", tokens=expected), rtol=1e-6)

    at(10, 0)
    at(64, 0)  # the maximum itself is not beyond it
    at(65, 65)
    at(100, 100)
    at(80, 100)  # a shorter call keeps the larger table
    at(64, 100)  # and so does the maximum
    at(63, 0)  # but one below it sets it back
    at(80, 80)


def test_longrope_forward_switches_at_the_original_length_and_back() -> None:
    rope = embedding("longrope")
    for length in (16, 17, 16, 200, 1):
        np.testing.assert_allclose(np.array(rope.forward_table(length)), oracle("longrope", tokens=length), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"factor": 20.0}, 0.1 * math.log(20) + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"factor": None}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.7}, 0.7),
        ({"attention_factor": 0.0}, 0.0),
        ({"attention_factor": None}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.7}, 0.1 * math.log(4) + 1),
        ({"mscale_all_dim": 0.7}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)),
        ({"mscale": 0.7, "mscale_all_dim": 0.3, "attention_factor": 2.0}, 2.0),
    ],
    ids=str,
)
def test_attention_factor_of_yarn(options: dict[str, Any], expected: float) -> None:
    assert embedding("yarn", **options).attention_factor == pytest.approx(expected, rel=1e-12)


def test_attention_factor_of_afm_is_the_published_one() -> None:
    factor = embedding("yarn", factor=20.0, mscale=1.0).attention_factor
    assert factor == pytest.approx(1.29957, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, math.sqrt(1 + math.log(4) / math.log(16))),
        ({"factor": 8.0}, math.sqrt(1 + math.log(8) / math.log(16))),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.5}, 1.5),
        ({"attention_factor": 0.0}, 0.0),
        ({"original_max_position_embeddings": 64}, 1.0),
    ],
    ids=str,
)
def test_attention_factor_of_longrope(options: dict[str, Any], expected: float) -> None:
    assert embedding("longrope", **options).attention_factor == pytest.approx(expected, rel=1e-12)


def test_zero_betas_of_yarn_mean_the_defaults() -> None:
    expected = np.array(embedding("yarn").base_table)
    for options in (
        {"beta_fast": 0, "beta_slow": 0},
        {"beta_fast": None, "beta_slow": None},
        {"beta_fast": 32, "beta_slow": 1},
    ):
        np.testing.assert_array_equal(np.array(embedding("yarn", **options).base_table), expected)


def test_range_of_yarn_is_rounded_outwards_unless_told_not_to() -> None:
    plain, exact = (
        np.array(embedding("yarn", original_max_position_embeddings=4096, truncate=truncate).base_table)
        for truncate in (True, False)
    )
    low, high = (16 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(1e4)) for turns in (32, 1))
    for table, a, b in ((plain, math.floor(low), math.ceil(high)), (exact, low, high)):
        ramp = np.clip((np.arange(8) - a) / (b - a), 0, 1)
        np.testing.assert_allclose(table, oracle("default") * (1 - ramp * 3 / 4), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partial", [0.25, 0.5, 15 / 16, 1.0, 1.5])
def test_partial_rotation_is_ignored_zeroed_or_refused(kind: str, partial: float) -> None:
    def make() -> RotaryEmbedding:
        return embedding(kind, partial_rotary_factor=partial)

    if kind == "default":
        np.testing.assert_array_equal(np.array(make().base_table), np.array(embedding("default").base_table))
    elif kind == "proportional" and partial <= 1:
        kept = int(partial * 16 // 2)
        table = np.array(make().base_table)
        assert (table[:kept] > 0).all() and not table[kept:].any()
    elif partial == 1.0:
        np.testing.assert_array_equal(np.array(make().base_table), np.array(embedding(kind).base_table))
    elif partial == 15 / 16 and kind != "yarn":
        # dim 15 has 8 exponents too, over 15 instead of 16
        assert make().dim == 15
        if kind == "linear":
            np.testing.assert_allclose(np.array(make().base_table), 1e4 ** -(np.arange(0, 15, 2) / 15) / 3, rtol=1e-6)
    else:
        with pytest.raises(ConfigError, match="partial_rotary_factor"):
            make().table(1)


@pytest.mark.parametrize("size", [7, 9, 4])
def test_longrope_factors_of_another_length_are_refused(size: int) -> None:
    with pytest.raises(ConfigError):
        embedding("longrope", long_factor=[2.0] * size).table(1)
    with pytest.raises(ConfigError):
        embedding("longrope", short_factor=[2.0] * size).forward_table(1)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 0},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0},
        {"rope_type": "longrope", **KINDS["longrope"], "original_max_position_embeddings": 1},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": math.nan},
        {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": math.inf},
        {"rope_type": "llama3", **KINDS["llama3"], "high_freq_factor": 0},
    ],
    ids=str,
)
def test_values_without_a_table_are_a_config_error(rope: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RotaryEmbedding(
            ArceeConfig(
                hidden_size=32, num_attention_heads=2, head_dim=16, max_position_embeddings=64, rope_parameters=rope
            )
        ).table(1)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_turning_is_rotate_half_with_cos_and_sin_rounded_first(dtype: mx.Dtype) -> None:
    rope = embedding("yarn", attention_factor=1.25)
    positions = mx.array([[0, 3, 9], [70, 71, 2]])
    x = mx.random.normal((2, 3, 4, 16), key=mx.random.key(1)).astype(dtype)
    rotation = rope.rotation(positions, rope.base_table, dtype)
    assert rotation.cos.dtype == rotation.sin.dtype == dtype
    angles = (positions[..., None].astype(mx.float32) * rope.base_table)[:, :, None]
    cos = mx.concatenate([mx.cos(angles) * 1.25] * 2, axis=-1).astype(dtype)
    sin = mx.concatenate([mx.sin(angles) * 1.25] * 2, axis=-1).astype(dtype)
    half = mx.concatenate([-x[..., 8:], x[..., :8]], axis=-1)
    assert mx.array_equal(rotate(x, rotation), x * cos + half * sin)


def test_turning_keeps_lengths_and_depends_on_distance_only() -> None:
    rope = embedding("default")
    q, k = mx.random.normal((2, 1, 1, 1, 16), key=mx.random.key(0))

    def product(at_q: int, at_k: int) -> float:
        turned = [
            rotate(x, rope.rotation(mx.array([[position]]), rope.base_table, mx.float32))
            for x, position in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum().item()

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-4)
    assert product(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_far_positions_turn_by_the_right_angle(kind: str) -> None:
    rope = embedding(kind, length=65536)
    table = np.array(rope.table(65536)).astype(np.float64)
    positions = np.array([0, 1, 4096, 65534, 65535])
    rotation = rope.rotation(mx.array(positions)[None], rope.table(65536), mx.float32)
    # The angle itself is rounded to float32, in transformers as well: up to 0.004 at 65,535.
    angles = (positions[:, None].astype(np.float32) * table.astype(np.float32)).astype(np.float64)
    np.testing.assert_allclose(np.array(rotation.cos)[0, :, 0, 0], np.cos(angles) * rope.attention_factor, atol=1e-6)
    np.testing.assert_allclose(np.array(rotation.sin)[0, :, 0, 1], np.sin(angles) * rope.attention_factor, atol=1e-6)
    np.testing.assert_array_equal(np.array(rotation.sin)[0, :, 0, 0], -np.array(rotation.sin)[0, :, 0, 1])


def test_large_integer_base_does_not_overflow() -> None:
    for kind in ("default", "dynamic"):
        table = np.array(embedding(kind, rope_theta=10_000_000_000).base_table)
        np.testing.assert_allclose(table, 1e10 ** -(np.arange(0, 16, 2) / 16), rtol=1e-6)
