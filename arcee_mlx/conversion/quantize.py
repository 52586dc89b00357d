"""Rows of a weight matrix become codes, scales and biases, a slice at a time.

Groups never cross rows, so a slice gives exactly the bits that the whole matrix would give.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import numpy as np

from ..checkpoint.files import DTYPES, read_columns, read_rows
from ..checkpoint.quantization import Quantization
from ..errors import ConversionError
from .fold import Scaling
from .plan import PlannedTensor

SLICE_BYTES = 2**24
# Two streams keep two cores busy, since MLX quantizes on one CPU thread a stream, while this thread reads and writes.
_STREAMS = 2
_FLOAT_DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def convert_slices(
    tensors: Iterable[PlannedTensor], scalings: Mapping[str, Scaling] | None = None, *, allow_nonfinite: bool = False
) -> Generator[tuple[PlannedTensor, list[mx.array]]]:
    """Reads tensors in slices of about 16 MB and converts them, at most four slices in memory at a time.

    Args:
        tensors: what to read and what to make of it.
        scalings: by the model's key, what tensors are multiplied by before they are cast.
        allow_nonfinite: let Inf and NaN of the source through. Floats keep them; of a quantized tensor, a group of
            weights that holds one is not finite as a whole (see `spoil_groups`).

    Yields:
        a tensor and, for its next slice of rows, one array for each of its `outputs`; all in order.

    Raises:
        CheckpointError: the source cannot be read.
        ConversionError: it holds Inf or NaN that is not allowed, or a value too large for the dtype it is cast to.
    """
    running: deque[_Slice] = deque()
    for i, (tensor, start, stop) in enumerate(_cut(tensors)):
        scaling = (scalings or {}).get(tensor.key)
        with mx.stream(_stream(i % _STREAMS)):
            rows = read_slice(tensor, start, stop, scaling).astype(DTYPES[tensor.dtype][0])
            outputs = [rows] if tensor.quantization is None else quantize(rows, tensor.quantization)
        mx.async_eval(rows, outputs)
        running.append(_Slice(tensor, start, stop, rows, outputs))
        del rows, outputs
        if len(running) > _STREAMS:
            yield _finish(running.popleft(), allow_nonfinite)
    while running:
        yield _finish(running.popleft(), allow_nonfinite)


def read_slice(tensor: PlannedTensor, start: int, stop: int, scaling: Scaling | None = None) -> mx.array:
    """Reads rows [start, stop) of a tensor as it will be stored, by neuron too, and scales them."""
    if tensor.by_neuron:
        rows = read_columns(tensor.source, start, stop)
        return rows if scaling is None else scaling.transpose().apply(rows, start)
    rows = read_rows(tensor.source, start, stop)
    return rows if scaling is None else scaling.apply(rows, start)


def quantize(rows: mx.array, quantization: Quantization) -> list[mx.array]:
    """Rounds rows of weights to the nearest of the values their group can hold.

    Returns:
        codes (uint32, packed), scales and biases, as `mx.quantized_matmul` takes them; see `Quantization.pack`.
    """
    group_size, bits, mode = quantization.group_size, quantization.bits, quantization.mode
    return list(mx.quantize(rows, group_size=group_size, bits=bits, mode=mode))


def spoil_groups(rows: mx.array, outputs: Sequence[mx.array]) -> list[mx.array]:
    """Makes every group of weights that holds Inf or NaN come back without a finite value.

    `mx.quantize` would hide a NaN and give its whole group wrong numbers. A product with the row loses nothing by this:
    one NaN in it makes it NaN anyway.

    Args:
        rows: the weights, shape (rows, columns).
        outputs: what they were quantized to: codes, then scales (and biases), shape (rows, groups).

    Returns:
        the same codes; where a group is spoilt, NaN for scale and bias, or 0xFF, which is NaN to the 8-bit scales.
    """
    codes, *parameters = outputs
    groups = mx.isfinite(rows).reshape(*parameters[0].shape, -1).all(axis=-1)
    marks = [mx.array(0xFF if p.dtype == mx.uint8 else float("nan"), p.dtype) for p in parameters]
    return [codes, *(mx.where(groups, p, mark) for p, mark in zip(parameters, marks, strict=True))]


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
        count = tensor.shape[0]
        step = max(1, SLICE_BYTES * count // max(tensor.source.nbytes, 1))
        for start in range(0, count, step):
            yield tensor, start, min(start + step, count)


def _finish(piece: _Slice, allow_nonfinite: bool) -> tuple[PlannedTensor, list[mx.array]]:
    """Waits for a slice and checks it."""
    tensor, rows, outputs = piece.tensor, piece.rows, piece.outputs
    if has_non_finite(rows):
        _refuse_non_finite(piece, allow_nonfinite)
        return tensor, outputs if tensor.quantization is None else spoil_groups(rows, outputs)
    if tensor.quantization is not None and any(has_non_finite(p) for p in outputs[1:] if p.dtype in _FLOAT_DTYPES):
        side = "columns" if tensor.by_neuron else "rows"
        raise ConversionError(
            f"{tensor.source.file}: {tensor.source.name!r} holds weights in {side} {piece.start} to {piece.stop - 1} that "
            f"are too far apart to share a scale in {_name(rows.dtype)}; expected ordinary weights; keep this model's "
            f"weights floats"
        )
    return tensor, outputs


def _refuse_non_finite(piece: _Slice, allow_nonfinite: bool) -> None:
    """Raises ConversionError for values that are not finite, unless the source has them and they are allowed."""
    source, dtype = piece.tensor.source, piece.rows.dtype
    lost, lost_before = (
        _find_non_finite(piece.rows),
        _find_non_finite(read_slice(piece.tensor, piece.start, piece.stop)),
    )
    if lost_before.any() and not allow_nonfinite:
        raise ConversionError(
            f"{source.file}: {source.name!r} holds Inf or NaN in {_name_rows(piece, lost_before)}; expected finite "
            f"weights; download the file again, ask its maker, or allow non-finite weights"
        )
    if (too_large := lost & ~lost_before).any():
        raise ConversionError(
            f"{source.file}: {source.name!r} holds a value too large for {_name(dtype)} in "
            f"{_name_rows(piece, too_large)}; expected at most {mx.finfo(dtype).max:g}; convert to bfloat16 or "
            f"float32 instead"
        )


def _find_non_finite(values: mx.array) -> np.ndarray:
    return ~np.array(mx.isfinite(values))


def _name_rows(piece: _Slice, found: np.ndarray) -> str:
    """Rows of the source, in words: from the first to the last of a slice in which something was found."""
    if piece.tensor.by_neuron:  # a slice of the source's columns, turned
        found, start = found.T, 0
    else:
        start = piece.start
    rows = np.flatnonzero(found.reshape(len(found), -1).any(axis=1)) + start
    return f"rows {rows[0]} to {rows[-1]}"


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


@cache
def _stream(index: int) -> mx.ThreadLocalStream:
    # Kept for the life of the process: MLX can only end a thread's streams all together, the caller's with ours.
    return mx.new_thread_local_stream(mx.default_device())
