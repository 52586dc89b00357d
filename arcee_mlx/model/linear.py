"""project: a linear layer's product; of several rows with quantized weights, on the CPU, sooner than MLX's own.

MLX's CPU backend goes through the packed weights once for each row of x, so that 8 rows take 8 times one. Here several
rows unpack the weights once, for whatever sums fastest: the process's BLAS where one was preloaded, else MLX's product
with weights stored by input. The sums are the same but for their order, and more exact than MLX's own.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache

import mlx.core as mx
import mlx.nn as nn

TURNED_BITS = (2, 4, 8)  # of a weight that crosses no byte
TURNED_OUTPUTS = 32  # MLX's smallest group, and the outputs' divisor
PIECE_BYTES = 2**21  # of a product's transient copies, each: what a core's cache holds


def project(layer: nn.Module, x: mx.array) -> mx.array:
    """x (..., E) @ weight.T + bias, (..., N).

    Args:
        layer: any linear layer, or an embedding of N tokens whose matrix is multiplied by.
        x: of one row, or in half precision, or on a GPU, it is MLX's own product.
    """
    if not _is_served(layer, x):
        return layer.as_linear(x) if hasattr(layer, "as_linear") else layer(x)
    rows, outputs = x.reshape(-1, x.shape[-1]), layer.weight.shape[0]
    multiply = _multiply_unpacked if has_fast_blas() else _multiply_turned
    step = max(PIECE_BYTES // (4 * rows.shape[1]) // 128, 1) * 128
    pieces = [multiply(rows, _Piece(layer, slice(i, i + step))) for i in range(0, outputs, step)]
    y = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=-1)
    y = y.reshape(*x.shape[:-1], outputs)
    return y + layer.bias if "bias" in layer else y


@cache
def has_fast_blas() -> bool:
    """Whether a BLAS was preloaded that replaces the slow one in MLX's Linux wheel, as the linker finds it."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "cblas_sgemm")


def unpack(
    weight: mx.array, scales: mx.array, biases: mx.array | None, group_size: int, bits: int, mode: str = "affine"
) -> mx.array:
    """`mx.dequantize`, whose bits it gives; of 8 bits in less than half the time on the CPU."""
    if bits != 8 or mode != "affine" or mx.default_device() != mx.cpu:
        return mx.dequantize(weight, scales, biases, group_size, bits, mode)
    assert biases is not None
    codes = mx.view(weight, mx.uint8).reshape(*scales.shape, group_size).astype(scales.dtype)
    return (codes * scales[..., None] + biases[..., None]).reshape(*scales.shape[:-1], -1)


def _is_served(layer: nn.Module, x: mx.array) -> bool:
    return (
        sys.platform == "linux"  # elsewhere MLX's own product is vectorized
        and mx.default_device() == mx.cpu
        and type(layer) in (nn.QuantizedLinear, nn.QuantizedEmbedding)
        and x.dtype == layer.scales.dtype == mx.float32  # scales of the modes of small floats are bytes
        and x.size >= 2 * x.shape[-1]
        and (has_fast_blas() or (layer.bits in TURNED_BITS and layer.weight.shape[0] % TURNED_OUTPUTS == 0))
    )


class _Piece:
    """Some of a layer's outputs."""

    def __init__(self, layer: nn.Module, outputs: slice) -> None:
        self.weight, self.scales, self.biases = layer.weight[outputs], layer.scales[outputs], layer.biases[outputs]
        self.group_size, self.bits = layer.group_size, layer.bits


def _multiply_unpacked(x: mx.array, layer: _Piece) -> mx.array:
    """(M, E) -> (M, N)."""
    return x @ unpack(layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits).T


def _multiply_turned(x: mx.array, layer: _Piece) -> mx.array:
    """(M, E) -> (M, N): the sum over the groups g of s[g, n] * (x[g] @ codes[g, :, n]) + b[g, n] * sum(x[g])."""
    bits, size, N = layer.bits, layer.group_size, layer.weight.shape[0]
    words = mx.contiguous(layer.weight.T)[:, None]  # (E * bits / 32, 1, N)
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)[:, None]
    codes = (words >> shifts).astype(mx.uint8) & (2**bits - 1)  # (E * bits / 32, 32 / bits, N)
    # As a matrix of 8 bits by input, with scales of 1; and centred, since sums of what is all positive lose digits.
    codes = mx.view(codes, mx.uint32).reshape(-1, size, N // 4)
    width = next(width for width in (128, 64, TURNED_OUTPUTS) if N % width == 0)
    ones, half = mx.ones((*codes.shape[:2], N // width)), 2 ** (bits - 1)
    scales, biases = mx.contiguous(layer.scales.T), mx.contiguous(layer.biases.T)  # (G, N)

    def multiply(x: mx.array) -> mx.array:
        grouped = x.reshape(x.shape[0], -1, size)  # (M, G, size)
        sums = mx.quantized_matmul(
            grouped.swapaxes(0, 1), codes, ones, -half * ones, transpose=False, group_size=width, bits=8
        )  # (G, M, N)
        return mx.addmm((sums * scales[:, None]).sum(axis=0), grouped.sum(axis=-1), biases + half * scales)

    step = max(PIECE_BYTES // (4 * scales.size), 1)
    pieces = [multiply(x[i : i + step]) for i in range(0, x.shape[0], step)]
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces)
