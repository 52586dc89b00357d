"""The sparse product on a GPU: builds the Metal or CUDA kernels from the text next to this file, plans, launches.

One text serves both: `cuda.h` says in CUDA what it says in Metal.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..activations import relu2
from .rows import Rows

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
    if rows.bits is not None and (rows.bits not in (4, 8) or rows.mode != "affine"):
        return f"rows are {rows.bits} bits, {rows.mode}; the kernels take 4 or 8, affine"
    if rows.weights.shape[0] < 8:  # MLX would hand over so small an input as `constant`
        return f"{rows.weights.shape[0]} neurons; the kernels take 8 or more"
    return None


def plan_product(tokens: int, neurons: int, rows: Rows) -> Plan:
    """The widest reads that leave a thread 32 sums or so, and slabs for the neurons and for a large GPU's cores."""
    word_bytes = rows.weights.dtype.size
    per_word = 8 * word_bytes // _weight_bits(rows)
    words = 16 // word_bytes
    while words > 128 // word_bytes // 32 and tokens * words * per_word > 32:
        words //= 2
    block = 128 // word_bytes * per_word
    chunks = -(-neurons // _CHUNK)
    slabs = max(-(-chunks // _SLAB_CHUNKS), -(-_FILLS_A_GPU // -(-rows.hidden // block)))
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
    arrays = {"x": x, "bias": bias, "residual": residual, "weights": rows.weights if rows.bits is None else None}
    given = {name: array for name, array in arrays.items() if array is not None}

    def read(given: dict[str, mx.array]) -> tuple[mx.array, Rows, mx.array | None, mx.array | None]:
        own = replace(rows, weights=given.get("weights", rows.weights))
        return given["x"], own, given.get("bias"), given.get("residual")

    @mx.custom_function
    def product(given: dict[str, mx.array]) -> mx.array:
        return _launch(*read(given))

    @product.vjp
    def _(given: dict[str, mx.array], cotangent: mx.array, _: mx.array) -> dict[str, mx.array]:
        def plain(*arrays: mx.array) -> mx.array:
            x, rows, bias, residual = read(dict(zip(given, arrays, strict=True)))
            y = rows.multiply(relu2(x))
            return y + (0 if bias is None else bias) + (0 if residual is None else residual)

        return dict(zip(given, mx.vjp(plain, list(given.values()), [cotangent])[1], strict=True))

    return product(given)  # type: ignore[return-value]


def _launch(x: mx.array, rows: Rows, bias: mx.array | None, residual: mx.array | None) -> mx.array:
    tokens, neurons = x.shape
    hidden = rows.hidden
    plan = plan_product(tokens, neurons, rows)
    shape = [("TOKENS", tokens), ("HIDDEN", hidden), ("SLABS", plan.slabs)]
    # A kernel has all of its inputs: one that is not there is another one's array, which it does not read. All dtypes
    # follow from the template, since MLX for CUDA knows a kernel by its name and template alone.
    scales, biases = (rows.weights if array is None else array for array in (rows.scales, rows.biases))
    (partials,) = _build("sparse_product", ("x", "weights", "scales", "biases"), "partials")(
        inputs=[x, rows.weights, scales, biases],
        template=[
            ("T", x.dtype),
            ("W", rows.weights.dtype),
            *shape,
            ("NEURONS", neurons),
            ("BITS", _weight_bits(rows)),
            ("GROUP", rows.group_size or hidden),
            ("WORDS", plan.words),
        ],
        grid=(-(-hidden // plan.block) * _THREADS, plan.slabs, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(plan.slabs, tokens, hidden)],
        output_dtypes=[mx.float32],
    )
    (y,) = _build("sum_partials", ("partials", "bias", "residual"), "y")(
        inputs=[partials, *(partials if array is None else array for array in (bias, residual))],
        template=[
            ("T", x.dtype),
            *shape,
            ("HAS_BIAS", bias is not None),
            ("HAS_RESIDUAL", residual is not None),
        ],
        grid=(hidden, tokens, 1),
        threadgroup=(min(hidden, _THREADS), 1, 1),
        output_shapes=[(tokens, hidden)],
        output_dtypes=[x.dtype],
    )
    return y


def _weight_bits(rows: Rows) -> int:
    return rows.bits or _FLOATS[rows.weights.dtype]


@functools.cache
def _build(name: str, inputs: tuple[str, ...], output: str) -> Any:
    source = (_FOLDER / f"{name}.metal").read_text(encoding="utf-8")
    if mx.cuda.is_available():
        header = (_FOLDER / "cuda.h").read_text(encoding="utf-8")
        return mx.fast.cuda_kernel(f"arcee_{name}", inputs, [output], source, header)
    return mx.fast.metal_kernel(f"arcee_{name}", inputs, [output], source)
