"""The sparse product on a GPU: builds the Metal or CUDA kernels from the text next to this file, plans, launches.

One text serves both: `cuda.h` says in CUDA what it says in Metal.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..activations import relu2
from .rows import Rows

BITS = (4, 8)  # of packed rows
MAX_TOKENS = 8  # more need most neurons between them, and more registers than a thread has
_FOLDER = Path(__file__).parent
_FLOATS = {mx.float32: 32, mx.float16: 16, mx.bfloat16: 16}  # bits of a weight that is not packed
_THREADS, _CHUNK, _SLAB_CHUNKS = 256, 32, 32
_FILLS_A_GPU = 160  # threadgroups


@dataclass(frozen=True)
class Plan:
    """How the sparse product is laid out on the GPU; the terms are those of sparse_product.metal."""

    words: int
    block: int
    slabs: int


def explain_unserved(x: mx.array, rows: Rows, bias: mx.array | None = None) -> str | None:
    """Why `multiply` cannot take these arguments, in words; None where it can."""
    if x.shape[0] > MAX_TOKENS:
        return f"{x.shape[0]} tokens at once; the kernels take up to {MAX_TOKENS}"
    if x.dtype not in _FLOATS:
        return f"activations are {x.dtype}; the kernels take float32, float16 and bfloat16"
    floats = (rows.scales if rows.bits else rows.weights, bias)
    if other := next((array.dtype for array in floats if array is not None and array.dtype != x.dtype), None):
        return f"an array of {other} and activations of {x.dtype}; the kernels take one dtype"
    if rows.bits is None and rows.hidden % 8:
        return f"rows are {rows.hidden} floats; the kernels take multiples of 8"
    if rows.bits is not None and (rows.bits not in BITS or rows.mode != "affine"):
        return f"rows are {rows.bits} bits, {rows.mode}; the kernels take 4 or 8, affine"
    if rows.weights.shape[0] < 8:  # MLX would hand over so small an input as `constant`
        return f"{rows.weights.shape[0]} neurons; the kernels take 8 or more"
    return None


def plan_product(tokens: int, neurons: int, hidden: int, word: mx.Dtype, bits: int) -> Plan:
    """The widest reads that leave a thread 32 sums or so, and slabs for the neurons and for a large GPU's cores.

    Args:
        word: what the weights are stored in.
        bits: of a weight.
    """
    per_word = 8 * word.size // bits
    words = 16 // word.size
    while words > 128 // word.size // 32 and tokens * words * per_word > 32:
        words //= 2
    block = 128 // word.size * per_word
    chunks = -(-neurons // _CHUNK)
    slabs = max(-(-chunks // _SLAB_CHUNKS), -(-_FILLS_A_GPU // -(-hidden // block)))
    return Plan(words, block, min(slabs, chunks))


def multiply(x: mx.array, rows: Rows, bias: mx.array | None = None, residual: mx.array | None = None) -> mx.array:
    """relu2(x) @ rows + bias + residual, without reading the rows of neurons that are zero. Waits for nothing.

    A kernel has no gradient of its own: this has the plain product's.

    Args:
        x: (M, F), for which `explain_unserved` finds nothing.
        bias: (E,).
        residual: (M, E), of x's dtype.

    Returns:
        (M, E) of x's dtype; summed in float32.
    """
    arrays = [x, rows.weights]
    given = [array is not None for array in (rows.scales, bias, residual)]
    if rows.scales is not None and rows.biases is not None:
        arrays += [rows.scales, rows.biases]
    arrays += [array for array in (bias, residual) if array is not None]
    return _differentiable(rows.bits, rows.group_size, *given)(*arrays)


@functools.cache  # a function of its own for each of a model's layers and tokens would cost more than the rest
def _differentiable(
    bits: int | None, group_size: int | None, is_packed: bool, has_bias: bool, has_residual: bool
) -> Callable[..., mx.array]:
    def read(arrays: Sequence[mx.array]) -> tuple[mx.array, Rows, mx.array | None, mx.array | None]:
        x, weights, *rest = arrays
        scales, biases = (rest.pop(0), rest.pop(0)) if is_packed else (None, None)
        bias = rest.pop(0) if has_bias else None
        return x, Rows(weights, scales, biases, bits, group_size), bias, rest.pop(0) if has_residual else None

    @mx.custom_function
    def product(*arrays: mx.array) -> mx.array:
        return _launch(*read(arrays))

    @product.vjp
    def _(arrays: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        fixed = {1, 2, 3} if is_packed else set()  # packed weights are not trained, as everywhere in MLX
        free = [i for i in range(len(arrays)) if i not in fixed]

        def plain(*own: mx.array) -> mx.array:
            replaced = dict(zip(free, own, strict=True))
            x, rows, bias, residual = read([replaced.get(i, array) for i, array in enumerate(arrays)])
            y = rows.multiply(relu2(x))
            return y + (0 if bias is None else bias) + (0 if residual is None else residual)

        gradients = dict(zip(free, mx.vjp(plain, [arrays[i] for i in free], [cotangent])[1], strict=True))
        return [gradients[i] if i in gradients else mx.zeros_like(array) for i, array in enumerate(arrays)]

    return product  # type: ignore[return-value]


def _launch(x: mx.array, rows: Rows, bias: mx.array | None, residual: mx.array | None) -> mx.array:
    weights = rows.weights
    key = (*x.shape, rows.hidden, rows.bits, rows.group_size, x.dtype, weights.dtype)
    product, total = _settings(*key, bias is not None, residual is not None)
    # A kernel has all of its inputs: one that is not there is another one's array, which it does not read. All dtypes
    # follow from the template, since MLX for CUDA knows a kernel by its name and template alone.
    scales, biases = (weights, weights) if rows.scales is None else (rows.scales, rows.biases)
    (partials,) = _build("sparse_product", ("x", "weights", "scales", "biases"), "partials")(
        inputs=[x, weights, scales, biases], **product
    )
    (y,) = _build("sum_partials", ("partials", "bias", "residual"), "y")(
        inputs=[partials, partials if bias is None else bias, partials if residual is None else residual], **total
    )
    return y


@functools.cache
def _settings(
    tokens: int, neurons: int, hidden: int, bits: int | None, group_size: int | None, dtype: mx.Dtype, word: mx.Dtype,
    has_bias: bool, has_residual: bool,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """What the two kernels are called with besides their inputs."""
    weight_bits = bits or _FLOATS[word]
    plan = plan_product(tokens, neurons, hidden, word, weight_bits)
    shape = [("TOKENS", tokens), ("HIDDEN", hidden), ("SLABS", plan.slabs)]
    form = [("NEURONS", neurons), ("BITS", weight_bits), ("GROUP", group_size or hidden), ("WORDS", plan.words)]
    product = {
        "template": [("T", dtype), ("W", word), *shape, *form],
        "grid": (-(-hidden // plan.block) * _THREADS, plan.slabs, 1),
        "threadgroup": (_THREADS, 1, 1),
        "output_shapes": [(plan.slabs, tokens, hidden)],
        "output_dtypes": [mx.float32],
    }
    total = {
        "template": [("T", dtype), *shape, ("HAS_BIAS", has_bias), ("HAS_RESIDUAL", has_residual)],
        "grid": (hidden, tokens, 1),
        "threadgroup": (min(hidden, _THREADS), 1, 1),
        "output_shapes": [(tokens, hidden)],
        "output_dtypes": [dtype],
    }
    return product, total


@functools.cache
def _build(name: str, inputs: tuple[str, ...], output: str) -> Any:
    source = (_FOLDER / f"{name}.metal").read_text(encoding="utf-8")
    if mx.cuda.is_available():
        header = (_FOLDER / "cuda.h").read_text(encoding="utf-8")
        return mx.fast.cuda_kernel(f"arcee_{name}", inputs, [output], source, header)
    return mx.fast.metal_kernel(f"arcee_{name}", inputs, [output], source)
