"""Rounding with error feedback (GPTQ): each column's rounding error is made up for by the columns rounded after it.

For inputs x with second moments H, the error that counts is tr((W - Q) H (W - Q)^T). Columns are rounded one at a time,
the most used first. With H = (I + U) D (I + U)^T, U strictly upper, a column w_k is rounded at
w_k + sum_{j<k} (w_j - q_j) U_jk, which is what GPTQ's update by the inverse of H comes to, with one factorisation of H
and no inverse.

Sources: GPTQ, arXiv 2210.17323; its equal by factors of H, QuIP, arXiv 2307.13304 (theorem 6). Everything is numpy on
the CPU: a Mac's Accelerate and the OpenBLAS in numpy's Linux wheels factor matrices that MLX does not factor on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.quantization import Quantization
from .cholesky import factorize, solve_factored

Floats = NDArray[np.floating]
# Share of the mean of H's diagonal that is added to it: against directions the calibration text hardly has.
DAMPING = 0.01
CORRECTION_DAMPING = 0.1
# Of a row's length: what a text asks for beyond that is about the text, or about layers before that are rounded badly.
MOST_CHANGE = 0.5
_BLOCK_COLUMNS = 128
_CLIPS = np.linspace(1.0, 0.6, 17, dtype=np.float32)
_ROWS_AT_ONCE_WEIGHTS = 2**22
_LEAST_SCALE = 1e-7  # as in MLX; float16 does not round it to 0


@dataclass(frozen=True)
class Rounded:
    """A matrix in a packed form, rows in groups along their length.

    Attributes:
        codes: uint8 (rows, columns).
        scales, biases: float32 (rows, columns / group_size), exactly representable in the dtype they are stored in.
        values: float32 (rows, columns): codes * scales + biases.
    """

    codes: NDArray[np.uint8]
    scales: Floats
    biases: Floats
    values: Floats

    def pack(self, form: Quantization, dtype: mx.Dtype) -> list[mx.array]:
        """As `mx.quantize` gives it: codes packed in uint32, scales, biases."""
        return [
            pack_codes(self.codes, form.bits),
            mx.array(self.scales).astype(dtype),
            mx.array(self.biases).astype(dtype),
        ]


class ErrorFeedback:
    """Rounds the weights of layers that read the same inputs; the factorisation is made once."""

    def __init__(self, moments: Floats) -> None:
        """Args: moments: (in, in), the mean of x x^T over a calibration text; float32 or float64, which is computed in."""
        damped = damp(moments, DAMPING)
        self._importance = np.diag(damped).copy()
        self._order = np.argsort(-self._importance, kind="stable")
        # Reversed both ways, the lower Cholesky factor is the upper one that is needed: moments = R R^T.
        backwards = self._order[::-1]
        damped = damped[np.ix_(backwards, backwards)]
        self._feed = factorize(damped)[::-1, ::-1]
        self._feed /= np.diag(self._feed).copy()

    def round_by_column(self, weight: Floats, form: Quantization, dtype: mx.Dtype) -> Rounded:
        """Rounds a weight stored as nn.Linear stores it, groups along the inputs.

        Args:
            weight: (out, in); any part of the rows gives what the whole gives.
            form: affine.
            dtype: of stored scales and biases.
        """
        scales, biases = choose_grid(weight, form, dtype, self._importance)
        groups = np.arange(weight.shape[1]) // form.group_size

        def snap(column: Floats, index: int) -> tuple[NDArray[np.uint8], Floats]:
            scale, bias = scales[:, groups[index]], biases[:, groups[index]]
            codes = _nearest_codes(column, scale, bias, form.bits)
            return codes, codes * scale + bias

        codes, values = self._round(weight, snap)
        return Rounded(np.ascontiguousarray(codes.T), scales, biases, np.ascontiguousarray(values.T))

    def round_by_row(self, weight: Floats, form: Quantization, dtype: mx.Dtype) -> Rounded:
        """Rounds a weight that is stored transposed, a row for each input, groups along the outputs.

        An input's scales are chosen when its turn comes, with the errors it has to make up for already in it.

        Args:
            weight: (out, in), of nn.Linear, as a whole.
            form, dtype: as in `round_by_column`.

        Returns:
            the packed form of its transpose, (in, out).
        """
        outputs, inputs = weight.shape
        shape = (inputs, outputs // form.group_size)
        scales, biases = np.empty(shape, np.float32), np.empty(shape, np.float32)

        def snap(column: Floats, index: int) -> tuple[NDArray[np.uint8], Floats]:
            row_scales, row_biases = choose_grid(column[None], form, dtype)
            scales[index], biases[index] = row_scales[0], row_biases[0]
            scale, bias = (np.repeat(values, form.group_size) for values in (scales[index], biases[index]))
            codes = _nearest_codes(column, scale, bias, form.bits)
            return codes, codes * scale + bias

        codes, values = self._round(weight, snap)
        return Rounded(codes, scales, biases, values)

    def _round(
        self, weight: Floats, snap: Callable[[Floats, int], tuple[NDArray[np.uint8], Floats]]
    ) -> tuple[NDArray[np.uint8], Floats]:
        """Rounds column by column; `snap` gives codes and values of one. Returns both, (in, out)."""
        outputs, inputs = weight.shape
        codes, values = np.empty((inputs, outputs), np.uint8), np.empty((inputs, outputs), np.float32)
        errors = np.empty((inputs, outputs), self._feed.dtype)  # in the order of rounding, so that they lie together
        for start in range(0, inputs, _BLOCK_COLUMNS):
            block = slice(start, min(start + _BLOCK_COLUMNS, inputs))
            targets = weight[:, self._order[block]].T + self._feed[:start, block].T @ errors[:start]
            for i in range(block.start, block.stop):
                index = self._order[i]
                target = targets[i - start] + self._feed[start:i, i] @ errors[start:i]
                codes[index], values[index] = snap(target, index)
                errors[i] = weight[:, index] - values[index]
        return codes, values


def correct_weight(weight: Floats, shift: Floats, moments: Floats) -> Floats:
    """The weight that comes closest to the wanted outputs on the inputs there are: weight + shift moments^-1.

    Layers before this one are rounded already: its inputs are not those it was made for, and what is wrong with them
    can be made good here as far as it is linear in them, and no row moves by more than half its length.

    Args:
        weight: (out, in).
        shift: (out, in), the mean of (wanted output - weight x) x^T.
        moments: (in, in), the mean of x x^T.
    """
    factor = factorize(damp(moments, CORRECTION_DAMPING))
    change: Floats = solve_factored(factor, shift.T.astype(moments.dtype)).T
    most = MOST_CHANGE * np.linalg.norm(weight, axis=1, keepdims=True)
    length = np.linalg.norm(change, axis=1, keepdims=True)
    return weight + change * np.minimum(1, most / np.maximum(length, 1e-30))


def round_to_nearest(weight: Floats, form: Quantization, dtype: mx.Dtype, importance: Floats | None = None) -> Rounded:
    """Rounds rows by themselves, each group in the range of the least squared error; arguments as of `choose_grid`."""
    scales, biases = choose_grid(weight, form, dtype, importance)
    scale, bias = (np.repeat(values, form.group_size, axis=1) for values in (scales, biases))
    codes = _nearest_codes(weight, scale, bias, form.bits)
    return Rounded(codes, scales, biases, codes * scale + bias)


def damp(moments: Floats, share: float) -> Floats:
    """Adds a share of the mean of the diagonal to it, 1 where all of it is 0, so that nothing divides by 0."""
    damped = moments.copy()
    diagonal = np.diag(damped)
    mean = float(diagonal.mean())
    damped[np.diag_indices_from(damped)] = diagonal + (share * mean if mean > 0 else 1.0)
    return damped


def choose_grid(
    weight: Floats, form: Quantization, dtype: mx.Dtype, importance: Floats | None = None
) -> tuple[Floats, Floats]:
    """Chooses each group's scale and bias by trying ranges from all of it to 60 % and taking the least squared error.

    Args:
        weight: (rows, columns).
        form: affine.
        dtype: in which scales and biases will be stored: they are rounded to it before they are tried.
        importance: (columns,), weights of the squared errors; None for equal ones.

    Returns:
        scales and biases, float32 (rows, columns / group_size).
    """
    rows, columns = weight.shape
    shape = (rows, columns // form.group_size)
    scales, biases = np.empty(shape, np.float32), np.empty(shape, np.float32)
    step = max(1, _ROWS_AT_ONCE_WEIGHTS // columns)
    shares = np.ones(columns) if importance is None else importance
    shares = shares.astype(np.float32).reshape(-1, form.group_size)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        groups = weight[part].astype(np.float32).reshape(-1, *shares.shape)
        scales[part], biases[part] = _choose_part(groups, shares, form.bits, dtype)
    return scales, biases


def pack_codes(codes: NDArray[np.uint8], bits: int) -> mx.array:
    """Packs codes (rows, columns) as MLX does, a stream of `bits` each from the lowest: uint32 (rows, columns * bits / 32)."""
    rows = codes.shape[0]
    if bits == 8:
        return mx.array(np.ascontiguousarray(codes).view(np.uint32))
    stream = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
    return mx.array(np.packbits(stream.reshape(rows, -1), axis=1, bitorder="little").view(np.uint32))


def _choose_part(groups: Floats, shares: Floats, bits: int, dtype: mx.Dtype) -> tuple[Floats, Floats]:
    """Of (rows, groups, group_size)."""
    low, high = groups.min(axis=2, keepdims=True), groups.max(axis=2, keepdims=True)
    best_error = np.full(low.shape, np.inf, np.float32)
    best_scale, best_bias = np.ones_like(low), np.zeros_like(low)
    clips = _CLIPS[:, None, None, None]
    scales = _store(np.maximum((high - low) * (clips / (2**bits - 1)), _LEAST_SCALE), dtype)
    for scale, bias in zip(scales, _store(low * clips, dtype), strict=True):
        error = _nearest_codes(groups, scale, bias, bits) * scale + bias - groups
        error = np.einsum("rgc,gc->rg", np.square(error), shares)[..., None]
        better = error < best_error
        best_error, best_scale = np.where(better, error, best_error), np.where(better, scale, best_scale)
        best_bias = np.where(better, bias, best_bias)
    return best_scale[..., 0], best_bias[..., 0]


def _nearest_codes(values: Floats, scale: Floats, bias: Floats, bits: int) -> NDArray[np.uint8]:
    return np.clip(np.rint((values - bias) / scale), 0, 2**bits - 1).astype(np.uint8)


def _store(values: Floats, dtype: mx.Dtype) -> Floats:
    """Rounds to what `dtype` holds."""
    if dtype == mx.float32:
        return values.astype(np.float32)
    return np.array(mx.array(values.astype(np.float32)).astype(dtype).astype(mx.float32))
