"""The checks every conversion passes before it gets its name: structure, finite numbers, and sampled rows against the source.

They read the files back, so they see what a loader will see, whatever went wrong on the way there.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files import DTYPES, FLOATS, TensorEntry, open_checkpoint, read_rows
from ..checkpoint.opening import open_model
from ..checkpoint.quantization import Quantization
from ..errors import ArceeError, ConversionError
from ..measure.layers import dequantize
from .fold import Scaling
from .plan import PlannedTensor
from .quantize import SLICE_BYTES, has_non_finite, quantize, read_slice

Floats = NDArray[np.float64]
# Of small floats, which are finer where weights are small; nvfp4 has no scale for groups of very small weights.
_MOST_ERROR = {"mxfp4": 0.4, "mxfp8": 0.1, "nvfp4": 1.0}
_SMALLEST_STEP = 1e-6  # MLX's affine scale has a least value of 1e-7, in every dtype
_LEAST_ROWS, _LEAST_ROWS_CALIBRATED = 4, 16
_ADVICE = "the files are damaged, and nothing was kept; check the disk and the memory, and convert again"


def check_result(
    folder: Path,
    plan: Sequence[PlannedTensor],
    *,
    scalings: Mapping[str, Scaling] | None = None,
    calibrated: bool = False,
    allow_nonfinite: bool = False,
    on_progress: Callable[[str, int], None] | None = None,
) -> dict[str, float]:
    """Reads a converted folder back and checks it.

    Of floats the sampled rows must be the source's, cast, to the bit. What was rounded to the nearest may be off by as
    much as rounding them again is. Calibration moves weights on purpose, each as far as it likes: there the rows must
    be like their own source rows rather than like others, and what the whole is worth a comparison on a text must say.

    Args:
        folder: of the result.
        plan: what was to be written.
        scalings: by the model's key, what tensors of the source were multiplied by.
        calibrated: whether quantized tensors were rounded with error feedback, not to the nearest.
        allow_nonfinite: Inf and NaN of the source were let through.
        on_progress: told the key of each tensor that is checked, and the bytes written for it.

    Returns:
        by the names of planned tensors, the error of the sampled rows: their distance from the source's rows, relative
        to the length of these.

    Raises:
        ConversionError: the result is not what was planned; names file and tensor.
        CheckpointError: a file cannot be read.
    """
    check_structure(folder, plan)
    entries = open_checkpoint(folder).entries
    errors = {}
    for tensor in plan:
        if not allow_nonfinite:
            _check_finite(tensor, entries)
        errors[tensor.name] = _check_rows(tensor, entries, (scalings or {}).get(tensor.key), calibrated=calibrated)
        if on_progress is not None:
            on_progress(tensor.key, tensor.nbytes)
    return errors


def check_structure(folder: Path, plan: Sequence[PlannedTensor]) -> None:
    """Checks that every tensor is as planned, and that the folder is a model this package loads; reads no weight.

    Raises:
        ConversionError: it is not what was planned.
    """
    try:
        found = {name: (entry.dtype, entry.shape) for name, entry in open_checkpoint(folder).entries.items()}
        planned = {name: spec for tensor in plan for name, spec in tensor.outputs.items()}
        wrong = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
        if wrong:
            raise ConversionError(f"{wrong[0]!r} is {found.get(wrong[0])}; expected {planned.get(wrong[0])}")
        open_model(folder)
    except ArceeError as error:
        raise ConversionError(f"the converted files are not what was planned ({error}); nothing was kept") from error


def _check_finite(tensor: PlannedTensor, entries: Mapping[str, TensorEntry]) -> None:
    """Checks floats, and scales and biases, slice by slice; codes are always numbers."""
    mode = tensor.quantization.mode if tensor.quantization else ""
    for name in tensor.outputs:
        entry = entries[name]
        if entry.dtype not in (*FLOATS, "U8"):
            continue
        count = entry.shape[0]
        step = max(1, SLICE_BYTES * count // max(entry.nbytes, 1))
        for start in range(0, count, step):
            values = read_rows(entry, start, min(start + step, count))
            if _has_spoilt_scale(values, mode) if entry.dtype == "U8" else has_non_finite(values):
                raise ConversionError(
                    f"{entry.file}: {name!r} holds Inf or NaN in rows {start} to {start + values.shape[0] - 1}; expected "
                    f"finite numbers, as in the source; {_ADVICE}"
                )


def _has_spoilt_scale(scales: mx.array, mode: str) -> bool:
    """Whether scales of small floats hold NaN: 0xFF, or in nvfp4, whose scales have a sign, 0x7F too."""
    bits: NDArray[np.uint8] = np.array(scales)
    return bool(((bits | 0x80 if mode == "nvfp4" else bits) == 0xFF).any())


def _check_rows(
    tensor: PlannedTensor, entries: Mapping[str, TensorEntry], scaling: Scaling | None, *, calibrated: bool
) -> float:
    """Checks sampled rows of a tensor; returns their error."""
    form = tensor.quantization
    rows = _sample_rows(tensor, _LEAST_ROWS_CALIBRATED if calibrated and form else _LEAST_ROWS)
    dtype = DTYPES[tensor.dtype][0]
    source = mx.concatenate([read_slice(tensor, *part, scaling).astype(dtype) for part in rows])
    stored = [mx.concatenate([read_rows(entries[name], *part) for part in rows]) for name in tensor.outputs]
    numbers = [row for part in rows for row in range(*part)]
    if form is None:
        different = (_as_bytes(source) != _as_bytes(stored[0])).reshape(len(numbers), -1).any(axis=1)
        if different.any():
            row = numbers[int(different.argmax())]
            raise ConversionError(
                f"{_name(tensor, entries)} is not the source's in row {row}; expected the same; {_ADVICE}"
            )
        return 0.0
    expected, found, nearest = (
        np.array(values, dtype=np.float64)
        for values in (source.astype(mx.float32), _dequantize(stored, form), _dequantize(quantize(source, form), form))
    )
    finite = np.isfinite(expected).all(axis=1)  # all of them, unless other ones are allowed
    expected, found, nearest = expected[finite], found[finite], nearest[finite]
    if calibrated:
        _check_likeness(expected, found, _name(tensor, entries))
    else:
        limits = _limit_errors(expected, nearest, form)
        distances = _lengths(found - expected)
        if wrong := np.flatnonzero(~(distances <= limits)).tolist():
            row, length = np.array(numbers)[finite][wrong[0]], max(_lengths(expected)[wrong[0]], 1e-30)
            raise ConversionError(
                f"{_name(tensor, entries)} is off the source by {distances[wrong[0]] / length:.2%} in row {row}; expected "
                f"at most {limits[wrong[0]] / length:.2%}, which is what {form.form} can be off; {_ADVICE}"
            )
    total = float(_lengths(expected.reshape(1, -1))[0])
    return float(_lengths((found - expected).reshape(1, -1))[0]) / total if total else 0.0


def _limit_errors(expected: Floats, nearest: Floats, form: Quantization) -> Floats:
    """The most that rows rounded to the nearest may be away from their source: (rows,).

    Measured by rounding them again, and bounded by what no rounding exceeds: in a group of n weights the largest is
    exact and the others are off by half a step, which is at most the largest over 2**bits - 1; with as much as
    bfloat16 takes off scale and bias. For a weight that is off by more than itself is a nearer value, 0.
    """
    if form.mode == "affine":
        share = form.group_size * (1 / (2**form.bits - 1) + 3 * 2**-9) ** 2
        most = math.sqrt(share / (1 + share))
    else:
        most = _MOST_ERROR[form.mode]
    lengths = _lengths(expected)
    again = 1.05 * _lengths(nearest - expected) + 0.001 * lengths
    return np.minimum(again, most * lengths) + _SMALLEST_STEP * math.sqrt(expected.shape[1])


def _check_likeness(expected: Floats, found: Floats, name: str) -> None:
    """Checks that rows point where their source rows do, far more than where those of other rows do."""
    lengths, own_lengths = _lengths(expected), _lengths(found)
    if (own_lengths[lengths > 0.01 * lengths.mean()] == 0).any():
        raise ConversionError(f"{name} has a row of zeros; expected what is like the source's; {_ADVICE}")
    kept = (lengths > 0) & (own_lengths > 0)
    count = int(kept.sum())
    if count < 2:
        return
    expected, found = expected[kept] / lengths[kept, None], found[kept] / own_lengths[kept, None]

    def advantage(cosines: Floats) -> float:
        own = np.trace(cosines) / count
        return float(own - (cosines.sum() - np.trace(cosines)) / (count * (count - 1)))

    best, got = advantage(expected @ expected.T), advantage(found @ expected.T)
    if best > 0.1 and not got >= 0.05 * best:  # else the rows are much the same; NaN fails
        raise ConversionError(f"{name} is no more like its source than other rows are; expected it to be; {_ADVICE}")


def _sample_rows(tensor: PlannedTensor, least: int) -> list[tuple[int, int]]:
    """Ranges of rows, the same ones every time: the first, the last, and some from every slice; vectors as a whole."""
    count = tensor.shape[0]
    if len(tensor.shape) == 1:
        return [(0, count)]
    parts = min(count, least + tensor.source.nbytes // SLICE_BYTES)
    chances = [zlib.crc32(f"{tensor.name} {i}".encode()) / 2**32 for i in range(parts)]
    rows = {int((i + chance) * count / parts) for i, chance in enumerate(chances)} | {0, count - 1}
    return [(row, row + 1) for row in sorted(rows)]


def _dequantize(outputs: Sequence[mx.array], form: Quantization) -> mx.array:
    codes, scales, *biases = outputs
    return dequantize(codes, scales, biases[0] if biases else None, form)


def _name(tensor: PlannedTensor, entries: Mapping[str, TensorEntry]) -> str:
    return f"{entries[tensor.name].file}: {tensor.name!r}"


def _lengths(rows: Floats) -> Floats:
    return np.sqrt(np.square(rows).sum(axis=1))


def _as_bytes(values: mx.array) -> NDArray[Any]:
    return np.array(values.view(mx.uint8))
