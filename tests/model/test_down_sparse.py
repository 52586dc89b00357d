"""The down projection after ReLU²: every path gives the dense product's numbers, and the right path is taken."""

from __future__ import annotations

import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx.errors import InputError
from arcee_mlx.model.activations import relu2
from arcee_mlx.model.relu2 import down, kernels, self_check
from arcee_mlx.model.relu2.down import VARIABLE, ByNeuron, DownByNeuron, store_by_neuron

from tiny_decoder import build, close, ids

FLOAT_DEMO = Path(__file__).parents[1] / "assets" / "demo"
NEURONS, HIDDEN = 96, 64


def make_layer(bits: int | None = 4, bias: bool = False) -> ByNeuron:
    mx.random.seed(0)
    layer = DownByNeuron(NEURONS, HIDDEN, bias)
    return (layer if bits is None else layer.to_quantized(32, bits)).eval()  # type: ignore[return-value]


def make_input(*rows: int, zeros: float = 0.8) -> mx.array:
    """What goes into ReLU², negative with the probability `zeros`."""
    keys = mx.random.split(mx.random.key(3))
    x = mx.abs(mx.random.normal((*rows, NEURONS), key=keys[0]))
    return mx.where(mx.random.uniform(shape=x.shape, key=keys[1]) < zeros, -x, x)


def forbid_gathering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(down, "_find_active", lambda a: pytest.fail("rows were looked for"))


@pytest.fixture(autouse=True)
def slow_blas(monkeypatch):
    """MLX's own product with all rows, whatever the process was started with."""
    monkeypatch.setattr(down, "has_fast_blas", lambda: False)


@pytest.fixture
def gpu(emulator, monkeypatch):
    """An emulated GPU, on which kernels have not been used yet."""
    monkeypatch.setattr(down, "_on_gpu", lambda: True)
    self_check.find_fault.cache_clear()
    self_check._warned.clear()
    yield emulator
    self_check.find_fault.cache_clear()
    self_check._warned.clear()


@pytest.mark.parametrize("bits", [None, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 4), (8,)])
@pytest.mark.parametrize("bias", [False, True])
def test_gathered_rows_give_the_dense_sum(bits, rows, bias):
    layer, x, residual = make_layer(bits, bias), make_input(*rows, zeros=0.95), mx.random.normal((*rows, HIDDEN))
    assert down._find_active(relu2(x.reshape(-1, NEURONS))) is not None
    for extra in (None, residual):
        sparse, dense = (layer.after_relu2(x, extra, sparse=asked) for asked in ("on", "off"))
        assert sparse.shape == (*rows, HIDDEN)
        assert mx.array_equal(sparse, dense) if bits else close(sparse, dense, 1e-6)
        assert close(dense, layer(relu2(x)) + (0 if extra is None else extra), 1e-6)


def test_the_rows_of_most_neurons_are_never_copied():
    assert down._find_active(relu2(make_input(1, zeros=0.2))) is None
    assert down._find_active(relu2(make_input(1, zeros=0.8))).size < NEURONS * down.GATHER_SHARE


def test_small_layers_are_read_whole_unless_asked_otherwise(monkeypatch):
    layer, x = make_layer(), make_input(1)
    assert [layer.choose_path(x, asked) for asked in ("auto", "on", "off")] == ["dense", "gathered", "dense"]
    monkeypatch.setattr(down, "GATHER_WEIGHTS", NEURONS * HIDDEN)
    assert [layer.choose_path(x, asked) for asked in ("auto", "on", "off")] == ["gathered", "gathered", "dense"]


def test_without_an_active_neuron_bias_and_residual_are_left():
    layer, residual = make_layer(bias=True), mx.random.normal((1, HIDDEN))
    assert mx.array_equal(layer.after_relu2(-mx.ones((1, NEURONS)), residual), residual + layer.bias)
    assert mx.array_equal(layer.after_relu2(mx.zeros((1, NEURONS))), layer.bias[None])


@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_what_is_not_finite_is_active_and_reaches_the_output(value):
    x = mx.where(mx.arange(NEURONS) == 7, value, -1.0)[None]
    assert down._find_active(relu2(x)).tolist() == [7]
    assert not mx.isfinite(make_layer().after_relu2(x)).any()


def test_argument_before_environment_before_auto(monkeypatch):
    layer, x = make_layer(), make_input(1)
    monkeypatch.setenv(VARIABLE, "on")
    assert layer.choose_path(x) == "gathered"
    monkeypatch.setenv(VARIABLE, "off")
    assert layer.choose_path(x) == "dense"
    assert layer.choose_path(x, "on") == "gathered"
    monkeypatch.setenv(VARIABLE, "sometimes")
    with pytest.raises(InputError, match="ARCEE_MLX_SPARSE is 'sometimes'; expected off, on or auto"):
        layer.after_relu2(x)


def test_a_layer_made_of_another_is_in_training_only_if_that_is():
    layer = make_layer(bits=None)
    update = mx.zeros((NEURONS, HIDDEN))
    for training in (False, True):
        packed = layer.train(training).to_quantized(32, 4)
        made = [
            packed,
            layer.with_update(update),
            packed.with_update(update),
            packed.with_update(update, dequantize=True),
        ]
        assert [own.training for own in made] == [training] * 4


def test_many_tokens_and_training_read_all_rows(monkeypatch):
    monkeypatch.setenv(VARIABLE, "on")
    layer = make_layer()
    assert [layer.choose_path(make_input(n)) for n in (8, 9)] == ["gathered", "dense"]
    forbid_gathering(monkeypatch)
    layer.after_relu2(make_input(3, 3))
    layer.train().after_relu2(make_input(1))


@pytest.mark.parametrize("trace", [mx.compile, mx.vmap, lambda f: mx.compile(mx.vmap(f))])
def test_inside_a_transformation_the_dense_product_is_traced(trace):
    layer, x = make_layer(bits=None), make_input(1, 1)  # MLX has no vmap of packed weights
    assert close(trace(layer.after_relu2)(x), layer.after_relu2(x, sparse="off"), 1e-6)


@pytest.mark.parametrize("bits", [None, 4])
def test_gradients_through_left_out_rows_are_the_dense_ones(bits):
    layer, x, residual = make_layer(bits, bias=True), make_input(2, zeros=0.9), mx.random.normal((2, HIDDEN))
    direction = mx.random.normal((2, HIDDEN))
    assert down._find_active(relu2(x)) is not None

    def loss(parameters, x, residual, asked):
        layer.update(parameters)
        return (layer.after_relu2(x, residual, sparse=asked) * direction).sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2) if bits is None else (1, 2))
    parameters = layer.trainable_parameters()
    pairs = [dict(nn.utils.tree_flatten(list(gradient(parameters, x, residual, asked)))) for asked in ("on", "off")]
    assert all(close(pairs[0][name], pairs[1][name], 1e-6) for name in pairs[1])
    assert any("weight_by_neuron" in name for name in pairs[0]) == (bits is None)


def test_greedy_text_of_the_demo_model_is_the_same(monkeypatch):
    model, tokenizer = arcee_mlx.load(FLOAT_DEMO)
    store_by_neuron(model)
    nn.quantize(model, group_size=64, bits=8)
    seen = []
    found = down._find_active
    monkeypatch.setattr(down, "_find_active", lambda a: seen.append(found(a)) or seen[-1])
    ids = tokenizer.encode("Call me Ishmael.")
    tokens, logits = {}, {}
    for asked in ("on", "off"):
        monkeypatch.setenv(VARIABLE, asked)
        cache, new, tokens[asked], logits[asked] = model.make_cache(), mx.array([ids]), [], []
        for _ in range(60):
            logits[asked].append(model(new, cache)[:, -1])
            new = mx.argmax(logits[asked][-1], axis=-1, keepdims=True)
            tokens[asked].append(new.item())
    assert tokens["on"] == tokens["off"]
    assert close(mx.concatenate(logits["on"]), mx.concatenate(logits["off"]), 1e-5 * 20)
    assert sum(active is not None for active in seen) > len(seen) / 2, "rows were left out"


def test_a_float_model_is_stored_by_neuron_in_place(tmp_path):
    model = arcee_mlx.load_model(FLOAT_DEMO)
    ids = mx.array([[5, 17, 300, 42]])
    want, before = model(ids), sum(array.size for _, array in nn.utils.tree_flatten(model.parameters()))
    store_by_neuron(model)
    assert all(type(layer.mlp.down_proj) is DownByNeuron for layer in model.layers)
    assert sum(array.size for _, array in nn.utils.tree_flatten(model.parameters())) == before
    assert close(model(ids), want, 1e-4)
    store_by_neuron(model)  # nothing is left to do
    arcee_mlx.save_checkpoint(model, tmp_path / "model")
    again = arcee_mlx.load_model(tmp_path / "model")
    assert isinstance(again.layers[0].mlp.down_proj, DownByNeuron) and mx.array_equal(again(ids), model(ids))


def test_packed_rows_are_not_turned():
    model = build(intermediate_size=64)
    nn.quantize(model, group_size=32, bits=4)
    with pytest.raises(InputError, match=r"down_proj 0 is QuantizedLinear; expected nn.Linear; .* --layout by_neuron"):
        store_by_neuron(model)


def test_another_activation_takes_the_plain_product():
    model = build(hidden_act="silu", mlp_bias=True)
    want = model(ids())
    store_by_neuron(model)
    assert close(model(ids()), want)


class FakeGroup:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size

    def __bool__(self) -> bool:
        return True


@pytest.mark.parametrize("bits", [None, 4])
def test_shares_of_the_neurons_sum_to_the_whole(bits, monkeypatch):
    x, residual, whole = make_input(1), mx.random.normal((1, HIDDEN)), make_layer(bits, bias=True)
    parts = []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group: parts.append(y) or y)
    for rank in range(2):
        layer = make_layer(bits, bias=True)
        layer.shard(FakeGroup(rank, 2))
        share = slice(rank * NEURONS // 2, (rank + 1) * NEURONS // 2)
        assert layer.weight_by_neuron.shape[0] == NEURONS // 2
        got = layer.after_relu2(x[:, share], residual)
        assert close(got, parts[rank] + layer.bias + residual, 1e-6)
    assert close(sum(parts) + whole.bias + residual, whole.after_relu2(x, residual), 1e-6)
    with pytest.raises(InputError, match="5 processes for 96 neurons"):
        make_layer(bits).shard(FakeGroup(0, 5))


# On a GPU, which is emulated.


@pytest.mark.parametrize("bits", [None, 4])
def test_on_a_gpu_the_kernel_gives_the_layer_and_the_dense_gradient(gpu, bits):
    layer, x, residual = make_layer(bits, bias=True), make_input(1, 2), mx.random.normal((1, 2, HIDDEN))
    assert layer.choose_path(x[0]) == "kernel"
    sparse, dense = (layer.after_relu2(x, residual, sparse=asked) for asked in ("on", "off"))
    assert sparse.shape == dense.shape and close(sparse, dense, 1e-5)

    def loss(x, residual, asked):
        return mx.square(layer.after_relu2(x, residual, sparse=asked)).sum()

    for a, b in zip(*(mx.grad(loss, (0, 1))(x, residual, asked) for asked in ("on", "off")), strict=True):
        assert close(a, b, 1e-4)
    if bits is None:
        grads = [nn.value_and_grad(layer, loss)(x, residual, asked)[1] for asked in ("on", "off")]
        assert all(close(grads[0][name], grads[1][name], 1e-4) for name in ("weight_by_neuron", "bias"))


def test_on_a_gpu_a_share_of_the_neurons_goes_through_the_kernel(gpu, monkeypatch):
    parts = []
    monkeypatch.setattr(mx.distributed, "all_sum", lambda y, group: parts.append(y) or y)
    layer, x, residual = make_layer(bias=True), make_input(1), mx.random.normal((1, HIDDEN))
    whole = layer.after_relu2(x, residual)
    layer.shard(FakeGroup(0, 1))
    assert close(layer.after_relu2(x, residual), whole, 1e-5) and len(parts) == 1


def test_what_the_kernel_does_not_serve_is_dense_unless_it_was_demanded(gpu):
    layer, x = make_layer(bits=3), make_input(1)
    assert layer.choose_path(x) == "dense"
    with pytest.raises(InputError, match="is 'on' for rows are 3 bits, affine; the kernels take 4 or 8"):
        layer.after_relu2(x, sparse="on")
    assert make_layer().choose_path(x.astype(mx.float16)) == "dense"  # scales are float32


def test_on_a_gpu_a_prompt_is_a_plain_product_with_unpacked_rows(gpu):
    layer, x = make_layer(bias=True), make_input(down.UNPACK_TOKENS)
    assert layer.choose_path(x) == "unpacked" and layer.choose_path(x[1:]) == "dense"
    assert close(layer.after_relu2(x), layer(relu2(x)), 1e-5)


def test_a_kernel_is_checked_once_before_it_is_used(gpu, monkeypatch):
    checked = []
    measure = self_check.measure_error
    monkeypatch.setattr(self_check, "measure_error", lambda *variant: checked.append(variant) or measure(*variant))
    layer, x = make_layer(), make_input(1)
    for _ in range(3):
        layer.after_relu2(x)
    assert checked == [(mx.float32, 4, 32, 1)]


@pytest.mark.parametrize("mistake", ["1.0f / float", "@", "fma(scaled[m]"])
def test_a_kernel_that_is_wrong_or_does_not_compile_leaves_the_dense_path_and_one_warning(gpu, mistake):
    changed = {"1.0f / float": "1.5f / float", "@": "", "fma(scaled[m]": "fma(2.0f * scaled[m]"}[mistake]
    gpu.edit = lambda source: source.replace(mistake, changed) if changed else source + mistake
    layer, x = make_layer(), make_input(1)
    with pytest.warns(RuntimeWarning, match=r"the sparse kernel for 4 bits .* `arcee-mlx doctor`") as warned:
        y = layer.after_relu2(x)
    assert len(warned) == 1 and mx.array_equal(y, layer.after_relu2(x, sparse="off"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.after_relu2(x)
        make_layer(bits=8).after_relu2(x)  # another variant with the same fault: said once
    with pytest.raises(InputError, match="is 'on' for the sparse kernel"):
        layer.after_relu2(x, sparse="on")


def test_the_self_check_leaves_the_random_state_alone(gpu):
    state = np.array(mx.random.state[0])
    assert self_check.find_fault(mx.float16, 8, 64, 2) is None
    assert np.array_equal(state, np.array(mx.random.state[0]))


def test_kernels_are_built_on_first_use_only():
    kernels._build.cache_clear()
    make_layer().after_relu2(make_input(1))
    assert kernels._build.cache_info().currsize == 0
