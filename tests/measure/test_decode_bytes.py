"""Bytes of a decode step: the table they were worked out in for AFM-4.5B, and what is and is not read of a checkpoint."""

import math
from pathlib import Path

import mlx.nn as nn
import pytest

from arcee_mlx import DEMO_MODEL, ArceeConfig, ArceeForCausalLM, ArceeModel, save_checkpoint
from arcee_mlx.bench.afm_shape import AFM_CONFIG, tensor_shapes
from arcee_mlx.checkpoint.files import DTYPES, TensorEntry
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.checkpoint.quantization import Quantization
from arcee_mlx.measure.decode_bytes import count_decode_bytes

from conftest import tiny_config

ZEROS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)


def count_afm(down_bits=4, context_tokens=0):
    """AFM-4.5B in groups of 64 at 4 bits, its down projections at others."""
    entries, table = {}, {"group_size": 64, "bits": 4, "mode": "affine"}

    def put(key, dtype, shape):
        entries[key] = TensorEntry(key, dtype, shape, Path("-"), 0, math.prod(shape) * DTYPES[dtype][0].size)

    for name, shape in tensor_shapes(AFM_CONFIG["num_hidden_layers"]).items():
        if len(shape) == 1:
            put(name, "BF16", shape)
            continue
        path = name.removesuffix(".weight")
        bits = down_bits if path.endswith("down_proj") else 4
        table[path] = {"group_size": 64, "bits": bits, "mode": "affine"}
        for parameter, (dtype, packed) in Quantization(group_size=64, bits=bits).pack(*shape, "BF16").items():
            put(f"{path}.{parameter}", dtype, packed)
    return count_decode_bytes(
        ArceeConfig.from_dict({**AFM_CONFIG, "quantization": table}), entries, context_tokens=context_tokens
    )


def save(folder, model_class=ArceeForCausalLM, quantized=False, **changes):
    model = model_class(tiny_config(**changes))
    if quantized:
        nn.quantize(model, 32, 4)
    save_checkpoint(model, folder)
    return folder


def count(folder, context_tokens=0):
    opened = open_model(folder)
    entries = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
    return count_decode_bytes(opened.config, entries, context_tokens=context_tokens), opened


def test_a_token_of_afm_reads_what_its_weights_weigh() -> None:
    decode = count_afm()
    assert decode.step([1.0] * 36).dense_bytes == pytest.approx(2.414e9, abs=5e5)
    assert sum(decode.down) / decode.step([1.0] * 36).dense_bytes == pytest.approx(0.396, abs=5e-4)
    assert count_afm(context_tokens=4096).step([1.0] * 36).dense_bytes == pytest.approx(2.716e9, abs=5e5)


@pytest.mark.parametrize(
    ("kind", "context_tokens", "down_bits", "speedups"),
    [
        ("ideal_bytes", 0, 4, (1.25, 1.38, 1.46, 1.51, 1.55, 1.60, 1.62)),
        ("sparse_bytes", 0, 4, (1.19, 1.34, 1.42, 1.47, 1.53, 1.58, 1.61)),
        ("sparse_bytes", 4096, 4, (1.16, 1.29, 1.36, 1.40, 1.44, 1.49, 1.50)),
        ("sparse_bytes", 0, 8, (0.98, 1.17, 1.29, 1.37, 1.45, 1.54, 1.58)),
    ],
)
def test_the_table_of_afm_at_four_bits_comes_out(kind, context_tokens, down_bits, speedups) -> None:
    dense = count_afm(context_tokens=context_tokens).step([1.0] * 36).dense_bytes
    decode = count_afm(down_bits, context_tokens)
    found = [dense / getattr(decode.step([1 - zeros] * 36), kind) for zeros in ZEROS]
    assert found == pytest.approx(speedups, abs=0.01)


def test_a_tied_head_is_read_whole_and_the_embedding_by_the_row() -> None:
    decode, opened = count(DEMO_MODEL)
    total = sum(entry.nbytes for entry in opened.checkpoint.entries.values())
    row = 256 + 2 * 2 * 256 // 64  # codes of 8 bits; scale and bias of each group in bfloat16
    assert decode.embedding_row == row
    assert decode.step([1.0] * 5, tokens=2).dense_bytes == total + 2 * row


@pytest.mark.parametrize(("model_class", "outside"), [(ArceeForCausalLM, 400 * 64 * 4), (ArceeModel, 400 * 64 * 4)])
def test_an_embedding_of_its_own_is_read_by_the_row(tmp_path, model_class, outside) -> None:
    decode, opened = count(save(tmp_path / "model", model_class))
    total = sum(entry.nbytes for entry in opened.checkpoint.entries.values())
    assert decode.step([1.0, 1.0]).dense_bytes == total - outside + 64 * 4


@pytest.mark.parametrize("quantized", [False, True])
def test_both_layouts_of_the_down_projection_promise_the_same(tmp_path, quantized) -> None:
    steps = []
    for layout in ("standard", "by_neuron"):
        folder = save(tmp_path / layout, quantized=quantized, down_proj_layout=layout, mlp_bias=True)
        decode, _ = count(folder)
        steps.append(decode.step([0.05, 0.1]))
        assert 0.1 * max(decode.active_down) < min(decode.down)  # or no row would count
    assert steps[0] == steps[1]


def test_each_layer_counts_with_its_own_share(tmp_path) -> None:
    folder = save(tmp_path / "model")
    decode, _ = count(folder)
    matrix = 128 * 64 * 4  # rows of 256 bytes: whole lines
    partial_sums = 2 * 2 * 4 * 64 * 4  # written and read, of two layers, by four slabs of 32 neurons, in float32
    step = decode.step([0.25, 1.0], tokens=2)
    assert step.dense_bytes - step.ideal_bytes == 0.75 * matrix
    assert step.sparse_bytes - step.ideal_bytes == 2 * partial_sums
    assert step.active == 0.625


def test_the_cache_counts_keys_and_values_of_the_context(tmp_path) -> None:
    folder = save(tmp_path / "model")
    without, with_cache = (count(folder, tokens)[0].step([1.0, 1.0]).dense_bytes for tokens in (0, 10))
    assert with_cache - without == 10 * 2 * 2 * 32 * 2 * 2  # keys and values, heads, head_dim, bytes, layers


def test_narrow_rows_never_cost_more_than_the_matrix(tmp_path) -> None:
    decode, _ = count(save(tmp_path / "model", quantized=True))
    assert sum(decode.active_down) > sum(decode.down)
    step = decode.step([1.0, 1.0])
    assert step.sparse_bytes == step.dense_bytes + decode.partial_sums
