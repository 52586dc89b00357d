"""Rows of a weight matrix become codes, scales and biases, a slice at a time.

Groups never cross rows, so a slice gives exactly the bits that the whole matrix would give.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from ..checkpoint.files import DTYPES, read_rows
from ..checkpoint.quantization import Quantization
from ..errors import ConversionError
from .plan import PlannedTensor

SLICE_BYTES = 2**24
# Two streams keep two cores busy, since MLX quantizes on one CPU thread a stream, while this thread reads and writes.
_STREAMS = 2


def convert_slices(tensors: Iterable[PlannedTensor]) -> Generator[tuple[PlannedTensor, list[mx.array]]]:
    """Reads tensors in slices of about 16 MB and converts them, at most four slices in memory at a time.

    Yields:
        a tensor and, for its next slice of rows, one array for each of its `outputs`; all in order.

    Raises:
        CheckpointError: the source cannot be read.
        ConversionError: it holds Inf or NaN, or a value too large for the dtype it is cast to.
    """
    running: deque[_Slice] = deque()
    for i, (tensor, start, stop) in enumerate(_cut(tensors)):
        with mx.stream(_stream(i % _STREAMS)):
            rows = read_rows(tensor.source, start, stop).astype(DTYPES[tensor.dtype][0])
            outputs = [rows] if tensor.quantization is None else quantize(rows, tensor.quantization)
        mx.async_eval(rows, outputs)
        running.append(_Slice(tensor, start, stop, rows, outputs))
        del rows, outputs
        if len(running) > _STREAMS:
            yield _finish(running.popleft())
    while running:
        yield _finish(running.popleft())


def quantize(rows: mx.array, quantization: Quantization) -> list[mx.array]:
    """Rounds rows of weights to the nearest of the values their group can hold.

    Returns:
        codes (uint32, packed), scales and biases, as `mx.quantized_matmul` takes them; see `Quantization.pack`.
    """
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    return list(mx.quantize(rows, group_size=group_size, bits=bits, mode=mode))


def has_non_finite(values: mx.array) -> bool:
    """Whether an array of floats holds Inf or NaN.

    Their exponent bits are all ones, which no other value has: read as integers they are the largest of their sign.
    Two integer maxima find them some twenty times as fast as `mx.isfinite`, and quantizing would hide a NaN.
    """
    if not values.size:
        return False
    unsigned, signed, sign, infinity = {
        mx.float32: (mx.uint32, np.int32, 0x80000000, 0x7F800000),
        mx.float16: (mx.uint16, np.int16, 0x8000, 0x7C00),
        mx.bfloat16: (mx.uint16, np.int16, 0x8000, 0x7F80),
    }[values.dtype]
    bits: np.ndarray = np.array(values.view(unsigned), copy=False)
    return bool(bits.view(signed).max() >= infinity or bits.max() >= sign | infinity)


@dataclass(frozen=True)
class _Slice:
    """Rows [start, stop) of a tensor, in the dtype they are cast to, and what is being computed from them."""

    tensor: PlannedTensor
    start: int
    stop: int
    rows: mx.array
    outputs: list[mx.array]


def _cut(tensors: Iterable[PlannedTensor]) -> Iterator[tuple[PlannedTensor, int, int]]:
    for tensor in tensors:
        count = tensor.source.shape[0]
        step = max(1, SLICE_BYTES * count // max(tensor.source.nbytes, 1))
        for start in range(0, count, step):
            yield tensor, start, min(start + step, count)


def _finish(piece: _Slice) -> tuple[PlannedTensor, list[mx.array]]:
    """Waits for a slice and checks it."""
    if has_non_finite(piece.rows):
        source = piece.tensor.source
        where = f"{source.file}: {source.name!r} holds {{}} in rows {piece.start} to {piece.stop - 1}"
        if has_non_finite(read_rows(source, piece.start, piece.stop)):
            raise ConversionError(
                f"{where.format('Inf or NaN')}; expected finite weights; download the file again, or ask its maker"
            )
        dtype = str(piece.rows.dtype).removeprefix("mlx.core.")
        raise ConversionError(
            f"{where.format('a value too large for ' + dtype)}; expected at most {mx.finfo(piece.rows.dtype).max:g}; "
            f"convert to bfloat16 or float32 instead"
        )
    return piece.tensor, piece.outputs


@cache
def _stream(index: int) -> mx.ThreadLocalStream:
    # Kept for the life of the process: MLX can only end a thread's streams all together, the caller's with ours.
    return mx.new_thread_local_stream(mx.default_device())
