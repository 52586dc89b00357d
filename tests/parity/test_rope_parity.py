"""Rotation tables against transformers', to the last bit, at any position and through any calls."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

from transformers.models.arcee.modeling_arcee import ArceeRotaryEmbedding  # noqa: E402

from arcee_mlx import ArceeConfig  # noqa: E402
from arcee_mlx.model.rope import RotaryEmbedding  # noqa: E402

from parity_configs import CONFIGS, FACTORS, rope  # noqa: E402
from reference import TheirConfig, both, tiny  # noqa: E402

pytestmark = pytest.mark.parity


def assert_same_bits(mine: mx.array, reference: Any, about: Any) -> None:
    """Equal up to the last bits in which torch's vectorized pow, different on every CPU, is off."""
    a, b = np.array(mine), reference.numpy()
    assert a.shape == b.shape
    off = np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))
    assert off.max() <= 2, (off.tolist(), about)
    assert (off > 0).sum() <= 1 + off.size // 8, (off.tolist(), about)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"])
def test_rotation_table_is_transformers_to_the_last_bit(kind: str) -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        half = int(rng.choice([2, 4, 8, 32, 64]))
        options: dict[str, Any] = {"rope_theta": float(rng.choice([1e4, 5e5, 1e6, 123456.7]))}
        options["factor"] = float(rng.choice([1.0, 2.0, 3.3, 20.0]))
        original = int(rng.choice([128, 4096, 8192]))
        if kind in ("yarn", "llama3", "longrope"):
            options["original_max_position_embeddings"] = original
        if kind == "yarn":
            options |= {
                "beta_fast": float(rng.choice([32, 8])),
                "beta_slow": float(rng.choice([1, 2])),
                "truncate": bool(rng.integers(2)),
            }
        if kind == "llama3":
            options |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0, 8.0]))}
        if kind == "longrope":
            options |= {key: (1 + rng.random(half) * 5).tolist() for key in ("short_factor", "long_factor")}
        if kind == "proportional":
            options["partial_rotary_factor"] = float(rng.choice([0.25, 0.5, 0.9, 1.0]))
        values = tiny(head_dim=2 * half, max_position_embeddings=65536, rope_parameters={"rope_type": kind, **options})
        reference = ArceeRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(values))))
        mine = RotaryEmbedding(ArceeConfig.from_dict(values))
        assert mine.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-14)
        assert_same_bits(mine.base_table, reference.original_inv_freq, options)
        if kind in ("dynamic", "longrope"):
            positions = torch.tensor([[65535 * (1 + int(rng.integers(3)))]])
            reference(torch.zeros(1), positions)
            assert_same_bits(mine.table(int(positions[0, 0]) + 1), reference.inv_freq, options)
            lengths = mx.array([5, int(positions[0, 0]) + 1])
            assert_same_bits(mine.table(lengths)[1], reference.inv_freq, options)


@pytest.mark.parametrize("name", ["default", "linear", "yarn", "longrope", "llama3", "dynamic", "proportional"])
def test_far_positions_turn_as_in_transformers(name: str) -> None:
    values = tiny(
        max_position_embeddings=65536, **{k: v for k, v in CONFIGS[name].items() if k != "max_position_embeddings"}
    )
    reference = ArceeRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(values))))
    mine = RotaryEmbedding(ArceeConfig.from_dict(values))
    positions, my_positions = both(np.array([[0, 1, 4095, 4096, 30000, 65534, 65535]]))
    cos, sin = reference(torch.zeros(1), positions)
    got = mine.rotation(my_positions, mine.table(65536), mx.float32)
    half = cos.shape[-1] // 2
    np.testing.assert_allclose(np.array(got.cos)[0, :, 0, 0], cos[0, :, :half].numpy(), atol=2e-5)
    np.testing.assert_allclose(np.array(got.sin)[0, :, 0, 1], sin[0, :, :half].numpy(), atol=2e-5)
    np.testing.assert_array_equal(np.array(got.sin)[0, :, 0, 0], -np.array(got.sin)[0, :, 0, 1])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_length_dependent_state_follows_transformers_through_any_calls(kind: str) -> None:
    options = {"factor": 2.0} if kind == "dynamic" else {**FACTORS, "original_max_position_embeddings": 32}
    values = tiny(max_position_embeddings=32, rope_parameters=rope(kind, **options))
    rng = np.random.default_rng(11)
    for _ in range(20):
        reference = ArceeRotaryEmbedding(TheirConfig.from_dict(json.loads(json.dumps(values))))
        mine = RotaryEmbedding(ArceeConfig.from_dict(values))
        for length in rng.choice([1, 5, 31, 32, 33, 34, 40, 64, 100], 12):
            reference(torch.zeros(1), torch.tensor([[0, int(length) - 1]]))
            assert_same_bits(mine.forward_table(int(length)), reference.inv_freq, length)
