"""The checks after a conversion: every honest result passes, and a damaged row, tensor or file does not."""

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import ArceeConfig
from arcee_mlx.checkpoint.files import open_checkpoint
from arcee_mlx.conversion import checks, quantize
from arcee_mlx.conversion.checks import check_result
from arcee_mlx.conversion.fold import bound_scalings
from arcee_mlx.conversion.prepare import plan_conversion
from arcee_mlx.conversion.recipe_file import read_recipe
from arcee_mlx.conversion.recipes import Quantization, Recipe, list_recipes
from arcee_mlx.conversion.run import convert
from arcee_mlx.errors import ConversionError

from conftest import TEXT, write_checkpoint
from conversion_data import FLOAT, SHAPE, random_weights, read_weights, write_source

UP, DOWN, NORM = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.down_proj", "model.norm"
FORMS = [Quantization(bits=bits) for bits in (2, 3, 4, 6, 8)]
FORMS += [Quantization(mode=mode) for mode in ("mxfp4", "nvfp4", "mxfp8")]


def by_form(function):
    return pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.mode}{form.bits}")(function)


def by_layout(function):
    return pytest.mark.parametrize("layout", ["standard", "by_neuron"])(function)


@pytest.fixture
def every_row(monkeypatch):
    """So that a single row that is wrong cannot be missed."""
    monkeypatch.setattr(checks, "_LEAST_ROWS", 10**6)
    monkeypatch.setattr(checks, "_LEAST_ROWS_CALIBRATED", 10**6)


def make(tmp_path, recipe, weights=None, *, source=None, calibrate=False, **changes):
    """A converted folder and its plan."""
    source = source or write_source(tmp_path / "in", weights, **changes)
    plan = plan_conversion(source, tmp_path / "elsewhere", recipe).tensors
    convert(source, tmp_path / "out", recipe, calibrate=calibrate, sequence_length=32)
    return tmp_path / "out", plan


def check_result_rows(folder, tensors):
    """Only what looks at rows, and only of these tensors."""
    entries = open_checkpoint(folder).entries
    for tensor in tensors:
        checks._check_rows(tensor, entries, None, calibrated=False)


def rewrite(folder, change):
    """The folder's weights, changed; by key, and in one file."""
    weights = read_weights(folder)
    mx.eval(weights)
    change(weights)
    (folder / "model.safetensors").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def change_rows(path, change):
    """Lets `change` have the numpy arrays of a layer: codes, scales and biases, or the floats, as raw bits."""

    def run(weights):
        for key in [key for key in weights if key.rpartition(".")[0] == path]:
            dtype = weights[key].dtype
            bits = np.array(weights[key].view(mx.uint8)).copy()
            weights[key] = mx.array(change(bits)).view(dtype)

    return run


@pytest.mark.parametrize("name", list_recipes())
@by_layout
def test_results_of_every_recipe_pass(tmp_path, name, layout):
    recipe = read_recipe(name)
    recipe = Recipe(quantization=recipe.quantization, rules=recipe.rules, dtype=recipe.dtype, layout=layout)
    folder, plan = make(tmp_path, recipe, attention_bias=True, mlp_bias=True, weights=random_weights(ArceeConfig(
        **SHAPE, attention_bias=True, mlp_bias=True
    )))  # fmt: skip
    errors = check_result(folder, plan)
    assert errors.keys() == {tensor.name for tensor in plan}
    for tensor in plan:
        assert (errors[tensor.name] > 0) == (tensor.quantization is not None)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_errors_are_relative_distances_from_the_source(tmp_path, bits, every_row):
    folder, plan = make(tmp_path, Recipe(quantization=Quantization(bits=bits)), dtype="F32")
    errors = check_result(folder, plan)
    found, source = read_weights(folder), read_weights(tmp_path / "in")[f"{UP}.weight"]
    parts = (found[f"{UP}.{part}"] for part in ("weight", "scales", "biases"))
    distance = np.linalg.norm(mx.dequantize(*parts, group_size=64, bits=bits) - source)
    np.testing.assert_allclose(errors[f"{UP}.weight"], distance / np.linalg.norm(source), rtol=1e-6)


SPECIAL = {
    "zeros": lambda shape: mx.zeros(shape),
    "rows of zeros": lambda shape: mx.random.normal(shape) * (mx.arange(shape[0]) % 3 > 0)[:, None],
    "all equal": lambda shape: mx.full(shape, 0.37),
    "rows all equal": lambda shape: mx.broadcast_to(mx.random.normal((shape[0], 1)), shape),
    "columns all equal": lambda shape: mx.broadcast_to(mx.random.normal((1, shape[1])), shape),
    "tiny": lambda shape: 1e-7 * mx.random.normal(shape),
    "large": lambda shape: 1e3 * mx.random.normal(shape),
    "far from zero": lambda shape: 5 + 0.01 * mx.random.normal(shape),
    "few": lambda shape: mx.random.normal(shape) * (mx.random.uniform(shape=shape) < 0.03),
    "heavy tails": lambda shape: mx.random.normal(shape) / (mx.abs(mx.random.normal(shape)) + 0.01),
    "one large weight in many halves": lambda shape: 0.49 + 0.51 * (mx.arange(shape[1]) % 64 == 0) * mx.ones(shape),
}


@by_form
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_no_weights_are_too_odd_to_be_rounded(tmp_path, form, dtype, every_row):
    weights = random_weights(ArceeConfig(**SHAPE))
    matrices = [key for key, value in weights.items() if value.ndim == 2]
    mx.random.seed(5)
    for key, kind in zip(matrices, SPECIAL, strict=False):
        weights[key] = SPECIAL[kind](weights[key].shape)
    assert len(matrices) >= len(SPECIAL)
    folder, plan = make(tmp_path, Recipe(quantization=form, dtype=dtype), weights)
    sources = {tensor.key: tensor.source for tensor in plan}
    check_result(folder, plan, scalings=bound_scalings(sources, plan) if dtype == "float16" else None)


def zero_row(bits):
    bits[-1] = 0
    return bits


def swap_rows(bits):
    bits[[5, 40]] = bits[[40, 5]]
    return bits


def repeat_row(bits):
    bits[-1] = bits[0]
    return bits


DAMAGE = {
    "a zeroed row": zero_row,
    "two rows swapped": swap_rows,
    "a row of elsewhere": repeat_row,
    "rows shifted": lambda bits: np.roll(bits, 1, axis=0),
    "the second half zeroed": lambda bits: bits * (np.arange(len(bits)) < len(bits) // 2)[:, None].astype(np.uint8),
}


@by_form
@by_layout
def test_a_damaged_row_is_found_and_named(tmp_path, form, layout, every_row):
    folder, plan = make(tmp_path, Recipe(quantization=form, layout=layout))
    original = read_weights(folder)
    mx.eval(original)
    for path in (UP, DOWN, "lm_head"):
        own = [tensor for tensor in plan if tensor.layer == path]
        check_result_rows(folder, own)
        for damage in DAMAGE.values():
            rewrite(folder, change_rows(path, damage))
            with pytest.raises(
                ConversionError, match=rf"safetensors: '{path}\.weight.* is off the source by .* in row"
            ):
                check_result_rows(folder, own)
            rewrite(folder, lambda weights: weights.update(original))
    check_result(folder, plan)


@by_form
def test_scales_alone_that_are_wrong_are_found(tmp_path, form, every_row):
    folder, plan = make(tmp_path, Recipe(quantization=form))

    def double(weights):
        scales = weights[f"{UP}.scales"]
        weights[f"{UP}.scales"] = (
            scales * 2 if scales.dtype != mx.uint8 else scales + (8 if form.mode == "nvfp4" else 1)
        )

    rewrite(folder, double)
    with pytest.raises(ConversionError, match=f"'{UP}.weight' is off the source"):
        check_result(folder, plan)


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.o_proj", NORM, "model.layers.1.input_layernorm"])
def test_a_float_that_differs_in_its_last_bit_is_found(tmp_path, path, every_row):
    folder, plan = make(tmp_path, FLOAT)

    def flip(bits):
        bits.reshape(-1)[-2] ^= 1
        return bits

    rewrite(folder, change_rows(path, flip))
    with pytest.raises(ConversionError, match=f"'{path}.weight' is not the source's in row 127; expected the same"):
        check_result(folder, plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [f"{UP}.scales", f"{UP}.biases", f"{NORM}.weight"])
def test_what_is_not_finite_is_found_in_any_row(tmp_path, monkeypatch, key, value):
    monkeypatch.setattr(checks, "SLICE_BYTES", 100)
    folder, plan = make(tmp_path, Recipe())

    def spoil(weights):
        flat = weights[key].reshape(-1)
        flat[77] = value
        weights[key] = flat.reshape(weights[key].shape)

    rewrite(folder, spoil)
    with pytest.raises(ConversionError, match=f"'{key}' holds Inf or NaN in rows"):
        check_result(folder, plan)


@pytest.mark.parametrize(("mode", "byte"), [("mxfp4", 0xFF), ("mxfp8", 0xFF), ("nvfp4", 0xFF), ("nvfp4", 0x7F)])
def test_scales_of_one_byte_that_are_no_number_are_found(tmp_path, mode, byte):
    folder, plan = make(tmp_path, Recipe(quantization=Quantization(mode=mode)))

    def spoil(weights):
        weights[f"{UP}.scales"][50, 1] = byte

    rewrite(folder, spoil)
    with pytest.raises(ConversionError, match=rf"'{UP}\.scales' holds Inf or NaN in rows 0 to 383"):
        check_result(folder, plan)


@pytest.mark.parametrize("recipe", [FLOAT, Recipe(), Recipe(quantization=Quantization(mode="mxfp4"))])
def test_allowed_numbers_that_are_not_finite_pass(tmp_path, recipe, every_row):
    weights = random_weights(ArceeConfig(**SHAPE))
    weights[f"{UP}.weight"][200, 7] = float("nan")
    source = write_source(tmp_path / "in", weights)
    plan = plan_conversion(source, tmp_path / "elsewhere", recipe).tensors
    convert(source, tmp_path / "out", recipe, allow_nonfinite=True)
    check_result(tmp_path / "out", plan, allow_nonfinite=True)
    rewrite(tmp_path / "out", change_rows(UP, zero_row))
    with pytest.raises(ConversionError, match=UP):
        check_result(tmp_path / "out", plan, allow_nonfinite=True)


@pytest.mark.parametrize("recipe", [Recipe(dtype="float16", layout=layout) for layout in ("standard", "by_neuron")]
                         + [Recipe(quantization=None, dtype="float16")])  # fmt: skip
def test_rows_of_folded_neurons_are_compared_with_the_folded_source(tmp_path, recipe, every_row):
    weights = random_weights(ArceeConfig(**SHAPE))
    weights[f"{UP}.weight"][:192] *= 1000
    source = write_source(tmp_path / "in", weights)
    planned = plan_conversion(source, tmp_path / "elsewhere", recipe)
    convert(source, tmp_path / "out", recipe)
    with pytest.raises(ConversionError, match=r"mlp\.(up|down)_proj"):
        check_result(tmp_path / "out", planned.tensors)
    scalings = bound_scalings(planned.sources, planned.tensors)
    check_result(tmp_path / "out", planned.tensors, scalings=scalings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint with a tokenizer, and a text to calibrate it on."""
    folder = tmp_path_factory.mktemp("calibrated")
    write_checkpoint(folder / "in")
    (folder / "text.txt").write_text(TEXT * 8)
    return folder / "in", folder / "text.txt"


@pytest.mark.parametrize("bits", [2, 4, 8])
@by_layout
def test_calibrated_results_pass_and_damaged_ones_do_not(tmp_path, trained, bits, layout):
    source, text = trained
    recipe = Recipe(quantization=Quantization(bits=bits, group_size=32), layout=layout)
    folder, plan = make(tmp_path, recipe, source=source, calibrate=text)
    errors = check_result(folder, plan, calibrated=True)
    assert errors[f"{UP}.weight"] > 0
    original = read_weights(folder)
    mx.eval(original)
    for path in (UP, DOWN, "model.layers.1.self_attn.q_proj", "lm_head"):
        for name in ("a zeroed row", "rows shifted", "the second half zeroed"):
            rewrite(folder, change_rows(path, DAMAGE[name]))
            with pytest.raises(ConversionError, match=rf"'{path}\.weight.*expected"):
                check_result(folder, plan, calibrated=True)
            rewrite(folder, lambda weights: weights.update(original))


@pytest.mark.parametrize("kind", SPECIAL)
def test_likeness_is_asked_only_where_rows_differ(kind):
    mx.random.seed(2)
    rows = np.array(SPECIAL[kind]((20, 128)), dtype=np.float64)
    noise = np.random.default_rng(0).normal(size=rows.shape)
    checks._check_likeness(rows, rows + noise * np.linalg.norm(rows, axis=1, keepdims=True) / 128**0.5, "x")


def test_the_structure_is_checked_first(tmp_path):
    folder, plan = make(tmp_path, Recipe())
    with pytest.raises(ConversionError, match=f"'{UP}.biases' is None; expected"):
        rewrite(folder, lambda weights: weights.pop(f"{UP}.biases"))
        check_result(folder, plan)
    with pytest.raises(ConversionError, match="no such folder"):
        check_result(tmp_path / "nothing", plan)


def test_sampled_rows_are_the_same_every_time_and_reach_every_slice(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "SLICE_BYTES", 10_000)
    plan = plan_conversion(write_source(tmp_path / "in"), tmp_path / "out", Recipe()).tensors
    for tensor in plan:
        ranges = checks._sample_rows(tensor, 4)
        assert ranges == checks._sample_rows(tensor, 4)
        rows = [row for part in ranges for row in range(*part)]
        count = tensor.shape[0]
        if len(tensor.shape) == 1:
            assert rows == list(range(count))
            continue
        assert rows[0] == 0 and rows[-1] == count - 1 and rows == sorted(set(rows))
        slice_rows = 10_000 * count // tensor.source.nbytes
        assert np.diff(rows).max() <= 2 * max(slice_rows, 1)
        assert len(rows) <= 6 + tensor.source.nbytes // 10_000


def test_progress_comes_to_all_bytes_of_the_result(tmp_path):
    folder, plan = make(tmp_path, Recipe())
    told = []
    check_result(folder, plan, on_progress=lambda key, nbytes: told.append((key, nbytes)))
    assert [key for key, _ in told] == [tensor.key for tensor in plan]
    assert sum(nbytes for _, nbytes in told) == sum(w.nbytes for w in read_weights(folder).values())
    assert quantize.SLICE_BYTES == checks.SLICE_BYTES
