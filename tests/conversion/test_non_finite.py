"""Weights that are Inf or NaN: refused by name, or passed on so that nothing near them comes back as a wrong number."""

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import ArceeConfig
from arcee_mlx.conversion import quantize
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.run import convert
from arcee_mlx.errors import ConversionError

from conversion_data import FLOAT, SHAPE, assert_nothing_left, random_weights, read_weights, write_source

UP = "model.layers.1.mlp.up_proj"
VALUES = [float("nan"), float("inf"), -float("inf")]


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices a tensor, the last one ragged."""
    monkeypatch.setattr(quantize, "SLICE_BYTES", 12_000)


@pytest.fixture
def source(tmp_path):
    """NaN, Inf and -Inf in rows 200 and 202: one slice, but not the first, and two groups of 64."""
    weights = random_weights(ArceeConfig(**SHAPE))
    weights[f"{UP}.weight"][200, 7], weights[f"{UP}.weight"][200, 9], weights[f"{UP}.weight"][202, 64] = VALUES
    return write_source(tmp_path / "in", weights)


def test_the_error_names_the_tensor_and_its_rows(source, tmp_path):
    with pytest.raises(
        ConversionError, match=rf"model\.safetensors: '{UP}\.weight' holds Inf or NaN in rows 200 to 202;"
    ):
        convert(source, tmp_path / "out")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_the_rows_are_the_sources_in_either_layout(tmp_path, layout):
    weights = random_weights(ArceeConfig(**SHAPE))
    down = "model.layers.1.mlp.down_proj.weight"
    weights[down][5, -1] = float("nan")
    source = write_source(tmp_path / "in", weights)
    with pytest.raises(ConversionError, match=f"'{down}' holds Inf or NaN in rows 5 to 5;"):
        convert(source, tmp_path / "out", Recipe(layout=layout))


def test_allowed_they_pass_through_a_float_conversion(source, tmp_path):
    convert(source, tmp_path / "out", FLOAT, allow_nonfinite=True)
    before, after = (read_weights(folder)[f"{UP}.weight"].astype(mx.float32) for folder in (source, tmp_path / "out"))
    np.testing.assert_array_equal(after, before)
    assert np.isnan(after[200, 7].item()) and after[202, 64].item() == -float("inf")


@pytest.mark.parametrize("bits", [4, 8])
def test_allowed_they_spoil_their_own_group_and_no_other(source, tmp_path, bits):
    convert(source, tmp_path / "out", Recipe(quantization=Quantization(bits=bits)), allow_nonfinite=True)
    found, weight = read_weights(tmp_path / "out"), read_weights(source)[f"{UP}.weight"]
    restored = mx.dequantize(
        *(found[f"{UP}.{part}"] for part in ("weight", "scales", "biases")), group_size=64, bits=bits
    )
    spoilt = np.zeros(weight.shape, bool)
    spoilt[200, :64] = spoilt[202, 64:] = True
    np.testing.assert_array_equal(np.array(mx.isnan(restored)), spoilt)
    expected = mx.dequantize(*mx.quantize(weight, 64, bits), group_size=64, bits=bits).astype(mx.float32)
    np.testing.assert_array_equal(np.array(restored.astype(mx.float32))[~spoilt], np.array(expected)[~spoilt])


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize(("mode", "group_size", "bits"), [("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)])
def test_eight_bit_scales_are_spoilt_too(value, mode, group_size, bits):
    rows = mx.random.normal((3, 64), key=mx.random.key(0))
    rows[1, 20] = value
    outputs = quantize.spoil_groups(rows, mx.quantize(rows, group_size=group_size, bits=bits, mode=mode))
    finite = mx.isfinite(mx.dequantize(*outputs, group_size=group_size, bits=bits, mode=mode))
    expected = np.ones((3, 64), bool)
    start = 20 // group_size * group_size
    expected[1, start : start + group_size] = False
    np.testing.assert_array_equal(np.array(finite), expected)


def test_a_value_too_large_for_its_new_dtype_is_refused_all_the_same(tmp_path):
    weights = random_weights(ArceeConfig(**SHAPE))
    weights["model.norm.weight"][5], weights["model.norm.weight"][6] = float("nan"), 70000.0
    source = write_source(tmp_path / "in", weights, dtype="F32")
    with pytest.raises(
        ConversionError, match=r"'model\.norm\.weight' holds a value too large for float16 in rows 6 to 6"
    ):
        convert(source, tmp_path / "out", Recipe(dtype="float16"), allow_nonfinite=True)


@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_finite_weights_whose_scale_is_not_are_refused(tmp_path, stored):
    weights = random_weights(ArceeConfig(**SHAPE))
    weights[f"{UP}.weight"][3, :2] = mx.array([3e38, -3e38])
    source = write_source(tmp_path / "in", weights, dtype=stored)
    with pytest.raises(
        ConversionError, match=rf"'{UP}\.weight' holds weights in rows .* too far apart to share a scale"
    ):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", FLOAT)
