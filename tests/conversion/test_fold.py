"""Float16 safety: what overflows as it is does not when powers of two are folded in, and nothing else changes a bit."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, load_model
from arcee_mlx.conversion import quantize, run
from arcee_mlx.conversion.fold import HEADROOM, Scaling, bound_scalings, count_scaled, layer_scalings, needs_fold
from arcee_mlx.conversion.prepare import plan_conversion
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.run import convert
from arcee_mlx.model.relu2.symmetry import FLOAT16_LIMIT

from conftest import write_tokenizer
from conversion_data import assert_same_bits, random_weights, read_weights, write_source

IDS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 80, 77, 12, 300]])
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 256,
}
FP16 = Recipe(quantization=None, dtype="float16")
LAYER = "model.layers.1"
FAR = slice(5, 128, 16)  # one neuron in sixteen reaches far


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices a tensor."""
    monkeypatch.setattr(quantize, "SLICE_BYTES", 5_000)


def write_far_source(folder, reach, *, evened=True, **changes):
    """A checkpoint in which some neurons of the last layer can reach far, by weights `reach` times as large.

    `evened`: they write as much as others, as in a trained model; such small weights leave float16's normal range.
    """
    weights = random_weights(ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2} | changes))
    up, down = (f"{LAYER}.mlp.{name}.weight" for name in ("up_proj", "down_proj"))
    scale = mx.ones((128, 1))
    scale[FAR] = reach
    weights[up] = weights[up] * scale
    if evened:
        weights[down] = weights[down] / mx.square(scale).T
    if f"{LAYER}.mlp.up_proj.bias" in weights:
        weights[f"{LAYER}.mlp.up_proj.bias"] = weights[f"{LAYER}.mlp.up_proj.bias"] * scale[:, 0]
    source = write_source(folder, weights, dtype="F32", **(SHAPE | changes))
    write_tokenizer(source)
    return source


def convert_naively(monkeypatch, source, target, recipe):
    with monkeypatch.context() as patch:
        patch.setattr(run, "needs_fold", lambda *_: False)
        convert(source, target, recipe)
    return target


def logits(folder, dtype=None):
    return load_model(folder, dtype=dtype)(IDS)


@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True}], ids=["", "biases"])
@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_a_model_that_overflows_float16_no_longer_does(tmp_path, monkeypatch, layout, changes):
    source = write_far_source(tmp_path / "in", 500.0, **changes)
    recipe = Recipe(quantization=None, dtype="float16", layout=layout)
    convert(source, tmp_path / "out", recipe)
    naive = convert_naively(monkeypatch, source, tmp_path / "naive", recipe)
    assert not mx.isfinite(logits(naive, "float16")).all().item()
    found, expected = logits(tmp_path / "out", "float16"), logits(source)
    assert mx.isfinite(found).all().item() and found.dtype == mx.float16
    np.testing.assert_allclose(
        np.array(found.astype(mx.float32)), np.array(expected), atol=0.02 * float(mx.abs(expected).max())
    )


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_where_nothing_overflows_every_bit_is_the_same(tmp_path, monkeypatch, layout):
    """Bits are equal as long as float16's normal range is not left. So it is for these weights; and squares that do fall
    below 2**-14 are too small beside others, which are near 1000, to show in their sum."""
    source = write_far_source(tmp_path / "in", 110.0, evened=False)
    recipe = Recipe(quantization=None, dtype="float16", layout=layout)
    convert(source, tmp_path / "out", recipe)
    naive = convert_naively(monkeypatch, source, tmp_path / "naive", recipe)
    folded, plain = read_weights(tmp_path / "out"), read_weights(naive)
    changed = {key for key in plain if not mx.array_equal(folded[key], plain[key]).item()}
    down = "weight_by_neuron" if layout == "by_neuron" else "weight"
    assert changed == {f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.down_proj.{down}"}
    found, expected = logits(tmp_path / "out", "float16"), logits(naive, "float16")
    assert mx.isfinite(expected).all().item() and mx.array_equal(found, expected).item()


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
@pytest.mark.parametrize("changes", [{}, {"mlp_bias": True}], ids=["", "biases"])
def test_quantized_codes_are_the_same_and_scales_take_the_factors(tmp_path, monkeypatch, layout, changes):
    """In the standard layout the neurons of a group share an exponent: else the group would be rounded otherwise."""
    source = write_far_source(tmp_path / "in", 110.0, evened=False, **changes)
    recipe = Recipe(quantization=Quantization(bits=4, group_size=32), dtype="float16", layout=layout)
    convert(source, tmp_path / "out", recipe)
    naive = convert_naively(monkeypatch, source, tmp_path / "naive", recipe)
    folded, plain = read_weights(tmp_path / "out"), read_weights(naive)
    changed = {key for key in plain if not mx.array_equal(folded[key], plain[key]).item()}
    expected = {f"{LAYER}.mlp.{name}.{part}" for name in ("up_proj", "down_proj") for part in ("scales", "biases")}
    assert changed == expected | ({f"{LAYER}.mlp.up_proj.bias"} if changes else set())
    factors = np.array(folded[f"{LAYER}.mlp.up_proj.scales"] / plain[f"{LAYER}.mlp.up_proj.scales"])[:, 0]
    grown = np.array(folded[f"{LAYER}.mlp.down_proj.scales"] / plain[f"{LAYER}.mlp.down_proj.scales"])
    assert (np.log2(factors) % 1 == 0).all() and factors.min() < 1
    if layout == "by_neuron":
        np.testing.assert_array_equal(grown, np.repeat(factors[:, None] ** -2, 2, axis=1))
        assert (factors == 1).any()
    else:
        np.testing.assert_array_equal(grown, np.repeat(factors.reshape(4, 32)[:, 0] ** -2.0, 64).reshape(4, 64).T)
    np.testing.assert_allclose(np.array(logits(tmp_path / "out")), np.array(logits(naive)), rtol=1e-5, atol=1e-5)


def test_a_quantized_model_stays_finite_in_float16(tmp_path, monkeypatch):
    """MLX's CPU backend refuses half-precision quantized products: the model is dequantized into float16 layers."""
    source = write_far_source(tmp_path / "in", 500.0)
    recipe = Recipe(quantization=Quantization(bits=8, group_size=32), dtype="float16", layout="standard")
    convert(source, tmp_path / "out", recipe)
    naive = convert_naively(monkeypatch, source, tmp_path / "naive", recipe)
    assert not mx.isfinite(dequantized_logits(naive, source)).all().item()
    assert mx.isfinite(dequantized_logits(tmp_path / "out", source)).all().item()


def dequantized_logits(folder, source):
    model, packed = load_model(source), read_weights(folder)
    weights = {}
    for key, _ in tree_flatten(model.parameters()):
        layer = key.removesuffix(".weight")
        if f"{layer}.scales" in packed:
            parts = (packed[f"{layer}.{name}"] for name in ("weight", "scales", "biases"))
            weights[key] = mx.dequantize(*parts, group_size=32, bits=8)
        else:
            weights[key] = packed[key]
    model.load_weights([(key, value.astype(mx.float16)) for key, value in weights.items()])
    return model(IDS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes_are_left_as_they_are(tmp_path, monkeypatch, dtype):
    source = write_far_source(tmp_path / "in", 500.0)
    recipe = Recipe(quantization=None, dtype=dtype)
    convert(source, tmp_path / "out", recipe)
    naive = convert_naively(monkeypatch, source, tmp_path / "naive", recipe)
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(naive))


@pytest.mark.parametrize("act", ["relu", "silu", "gelu"])
def test_other_activations_are_left_as_they_are(tmp_path, monkeypatch, act):
    source = write_far_source(tmp_path / "in", 500.0, hidden_act=act)
    convert(source, tmp_path / "out", FP16)
    naive = convert_naively(monkeypatch, source, tmp_path / "naive", FP16)
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(naive))
    assert needs_fold("float16", "relu2") and not needs_fold("float16", act) and not needs_fold("bfloat16", "relu2")


def test_what_a_text_makes_of_neurons_folds_less_than_bounds_do_and_enough(tmp_path):
    source = write_far_source(tmp_path / "in", 300.0)
    convert(source, tmp_path / "bounds", FP16)
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely, " * 20)
    convert(source, tmp_path / "recorded", FP16, calibrate=text, num_samples=4, sequence_length=32)
    key = f"{LAYER}.mlp.up_proj.weight"
    plain = np.array(read_weights(source)[key].astype(mx.float16).astype(mx.float32))
    bounds, recorded = (
        np.median(np.array(read_weights(tmp_path / name)[key].astype(mx.float32)) / plain, axis=1)
        for name in ("bounds", "recorded")
    )
    assert (recorded >= bounds).all() and (recorded > bounds).sum() >= 4
    assert (recorded[FAR] < 1).any() and mx.isfinite(logits(tmp_path / "recorded", "float16")).all().item()


def test_bounds_hold_for_the_inputs_that_go_furthest(tmp_path):
    """What a scaled neuron reaches at most is float16's limit, and more than half of it: no more is folded than needed."""
    source = write_far_source(tmp_path / "in", 300.0, mlp_bias=True)
    planned = plan_conversion(source, tmp_path / "out", FP16)
    scalings = bound_scalings(planned.sources, planned.tensors)
    assert set(scalings) == {f"{LAYER}.mlp.{name}" for name in ("up_proj.weight", "up_proj.bias", "down_proj.weight")}
    assert count_scaled(scalings) == len(range(128)[FAR])
    weights = read_weights(source)
    up = scalings[f"{LAYER}.mlp.up_proj.weight"].apply(weights[f"{LAYER}.mlp.up_proj.weight"])
    bias = scalings[f"{LAYER}.mlp.up_proj.bias"].apply(weights[f"{LAYER}.mlp.up_proj.bias"])
    norm = weights[f"{LAYER}.post_attention_layernorm.weight"]
    reached = np.array((mx.fast.rms_norm(1e3 * up * norm, norm, 1e-5) * up).sum(axis=1) + mx.abs(bias))
    assert (reached <= FLOAT16_LIMIT).all() and (reached[FAR] > 0.48 * FLOAT16_LIMIT).all()


def test_recorded_maxima_get_headroom(tmp_path):
    source = write_far_source(tmp_path / "in", 1.0)
    plan = plan_conversion(source, tmp_path / "out", FP16).tensors
    maxima = np.full(128, FLOAT16_LIMIT / HEADROOM)
    assert layer_scalings(LAYER, HEADROOM * maxima, plan, has_bias=False) == {}
    maxima[7] *= 1.01
    rows = layer_scalings(LAYER, HEADROOM * maxima, plan, has_bias=False)[f"{LAYER}.mlp.up_proj.weight"].rows
    assert np.flatnonzero(np.array(rows) != 1).tolist() == [7] and rows[7].item() == 0.5


@pytest.mark.parametrize(
    "parts", [{"rows": [0.5, 1, 0.25]}, {"columns": [4.0, 1, 16]}, {"rows": [1.5], "columns": [3.0]}, {}]
)
def test_a_scaling_comes_back_from_json(parts):
    scaling = Scaling(**{name: mx.array(values, mx.float32) for name, values in parts.items()})
    again = Scaling.from_dict(scaling.to_dict())
    for name in ("rows", "columns"):
        ours, theirs = getattr(scaling, name), getattr(again, name)
        assert (ours is None) == (theirs is None) and (ours is None or mx.array_equal(ours, theirs).item())


def test_a_scaling_of_part_of_the_rows_is_part_of_the_whole():
    rows, columns, values = mx.arange(1.0, 9.0), mx.arange(1.0, 5.0), mx.random.normal((8, 4))
    scaling = Scaling(rows, columns)
    whole = values * rows[:, None] * columns
    assert mx.array_equal(scaling.apply(values), whole).item()
    assert mx.array_equal(scaling.apply(values[3:6], 3), whole[3:6]).item()
    assert mx.array_equal(scaling.transpose().apply(values.T[1:3], 1), (values.T * columns[:, None] * rows)[1:3]).item()
    assert mx.array_equal(Scaling(rows).apply(rows[2:4], 2), rows[2:4] ** 2).item()
