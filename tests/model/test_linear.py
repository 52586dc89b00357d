"""Several rows by quantized weights on the CPU: MLX's numbers and gradients, whichever way they are summed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from arcee_mlx.model import linear
from arcee_mlx.model.linear import project, unpack
from arcee_mlx.model.relu2.down import DownByNeuron

from tiny_decoder import build, ids

E = 128
served = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device() != mx.cpu, reason="MLX's own product is quick elsewhere"
)


@pytest.fixture(params=[False, True], ids=["turned", "blas"])
def blas(request, monkeypatch) -> bool:
    """Whether the process claims to have a fast BLAS; the sums are right with a slow one, too."""
    monkeypatch.setattr(linear, "has_fast_blas", lambda: request.param)
    return request.param


@pytest.fixture
def own_forbidden(monkeypatch) -> None:
    for owner, name in ((nn.QuantizedLinear, "__call__"), (nn.QuantizedEmbedding, "as_linear")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("MLX's own product was taken"))


def make_layer(outputs: int = 96, bits: int = 8, group_size: int = 32, bias: bool = False) -> nn.QuantizedLinear:
    mx.random.seed(0)
    layer = nn.Linear(E, outputs, bias).to_quantized(group_size, bits)
    layer.biases = layer.biases + 0.1 * mx.random.normal(layer.biases.shape)  # not what the scales would let expect
    return layer


def multiply_exactly(layer: nn.Module, x: mx.array) -> mx.array:
    weight = mx.dequantize(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits)
    with mx.stream(mx.cpu):
        y = (x.astype(mx.float64) @ weight.astype(mx.float64).T).astype(mx.float32)
    return y + layer.bias if "bias" in layer else y


@served
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("outputs", [32, 64, 96, 384])
def test_several_rows_give_the_exact_sum(blas, own_forbidden, outputs, bits, group_size):
    for shape, bias in (((2,), False), ((3, 1), True), ((2, 5), True)):
        layer, x = make_layer(outputs, bits, group_size, bias), mx.random.normal((*shape, E))
        y = project(layer, x)
        assert y.shape == (*shape, outputs) and y.dtype == mx.float32
        assert mx.allclose(y, multiply_exactly(layer, x), rtol=0, atol=1e-5)


@served
@pytest.mark.parametrize("bits", [4, 8])
def test_in_pieces_the_sum_is_the_same_and_the_memory_bounded(blas, bits, monkeypatch):
    monkeypatch.setattr(linear, "PIECE_BYTES", 2**17)  # 256 outputs, 34 rows
    layer, x = make_layer(1952, bits), mx.random.normal((96, E))
    expected = multiply_exactly(layer, x)
    mx.eval(layer.parameters(), x, expected)
    mx.synchronize()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    y = project(layer, x)
    mx.eval(y)
    peak = mx.get_peak_memory() - before
    assert mx.allclose(y, expected, rtol=0, atol=1e-5)
    assert peak < 3 * y.nbytes + 10 * 2**17  # without pieces four times that


@served
def test_a_tied_embedding_is_served(blas, own_forbidden):
    embedding = nn.Embedding(64, E).to_quantized(32, 8)
    x = mx.random.normal((4, 3, E))
    assert mx.allclose(project(embedding, x), multiply_exactly(embedding, x), rtol=0, atol=1e-5)


@served
@pytest.mark.parametrize("bits", [3, 5, 6])
def test_weights_across_bytes_are_served_by_a_blas_alone(blas, bits, monkeypatch):
    layer, x, own = make_layer(bits=bits), mx.random.normal((4, E)), nn.QuantizedLinear.__call__
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.QuantizedLinear, "__call__", lambda layer, x: calls.append(layer) or own(layer, x))
    assert mx.allclose(project(layer, x), multiply_exactly(layer, x), rtol=0, atol=1e-5)
    assert bool(calls) != blas


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (make_layer(), mx.ones((1, E))),
        (make_layer(), mx.ones((1, 1, E))),
        (nn.Linear(E, 64), mx.ones((4, E))),
        (nn.Linear(E, 64).to_quantized(mode="mxfp4"), mx.ones((4, E))),
        (nn.Linear(E, 64).to_quantized(mode="nvfp4"), mx.ones((4, E))),
        (nn.Embedding(64, E), mx.ones((4, E))),
    ],
    ids=["one row", "one row in a batch", "floats", "mxfp4", "nvfp4", "a float embedding"],
)
def test_what_is_not_served_is_the_layers_own_product(blas, layer, x):
    own = layer.as_linear(x) if hasattr(layer, "as_linear") else layer(x)
    assert mx.array_equal(project(layer, x), own)


def test_half_precision_and_odd_outputs_are_the_layers_own_product(monkeypatch):
    monkeypatch.setattr(linear, "has_fast_blas", lambda: False)
    layer, x = make_layer(), mx.random.normal((4, E))
    odd = make_layer(outputs=40)
    layer.set_dtype(mx.bfloat16)
    assert mx.array_equal(project(layer, x.astype(mx.bfloat16)), layer(x.astype(mx.bfloat16)))
    assert mx.array_equal(project(odd, x), odd(x))


def test_a_gpus_products_are_its_own(blas, monkeypatch):
    layer, x = make_layer(), mx.random.normal((4, E))
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert mx.array_equal(project(layer, x), layer(x))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradients_are_those_of_the_layers_own_product(blas, bits):
    layer, x = make_layer(bits=bits, bias=True), mx.random.normal((4, E))

    def loss(multiply: Callable[[nn.Module, mx.array], mx.array]) -> list[mx.array]:
        def of(x: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
            own = make_layer(bits=bits, bias=True)
            own.scales, own.biases = scales, biases
            return multiply(own, x).square().sum()

        return mx.grad(of, argnums=[0, 1, 2])(x, layer.scales, layer.biases)

    for got, expected in zip(loss(project), loss(lambda layer, x: layer(x)), strict=True):
        assert mx.allclose(got, expected, rtol=1e-4, atol=1e-4) and mx.any(got != 0)


def test_a_compiled_product_is_the_same(blas):
    layer, x = make_layer(), mx.random.normal((4, E))
    assert mx.allclose(mx.compile(lambda x: project(layer, x))(x), project(layer, x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_weights_are_mlxs_to_the_bit(bits, dtype):
    packed = mx.quantize(mx.random.normal((48, E)).astype(dtype), 32, bits)
    assert mx.array_equal(unpack(*packed, 32, bits), mx.dequantize(*packed, 32, bits))


@served
def test_a_down_projection_is_unpacked_for_several_tokens_where_a_blas_is_fast(monkeypatch):
    layer, many, few = DownByNeuron(96, E).to_quantized(32, 8).eval(), mx.random.normal((8, 96)), mx.ones((2, 96))
    monkeypatch.setattr("arcee_mlx.model.relu2.down.has_fast_blas", lambda: False)
    expected = layer.after_relu2(many)
    assert layer.choose_path(many) == "dense"
    monkeypatch.setattr("arcee_mlx.model.relu2.down.has_fast_blas", lambda: True)
    assert (layer.choose_path(many), layer.choose_path(few)) == ("unpacked", "dense")
    assert mx.allclose(layer.after_relu2(many), expected, rtol=0, atol=1e-5)


@served
def test_a_quantized_model_goes_this_way_for_several_tokens(blas, own_forbidden):
    model = build(vocab_size=64, intermediate_size=64, head_dim=16)  # all outputs in 32s
    nn.quantize(model, group_size=32, bits=8, class_predicate=lambda _, m: hasattr(m, "to_quantized"))
    assert mx.all(mx.isfinite(model(ids(2, 6))))
