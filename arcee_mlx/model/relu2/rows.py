"""A matrix stored by neuron, packed or in floats, and the plain products with all of its rows or some."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from ..linear import unpack


@dataclass(frozen=True)
class Rows:
    """A matrix (F, E): a row for each neuron.

    Attributes:
        weights: uint32 (F, E * bits / 32); or floats (F, E), with nothing of what follows.
        scales, biases: (F, E / group_size); no biases in the modes of small floats.
        bits, group_size, mode: of the packed form.
    """

    weights: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int | None = None
    group_size: int | None = None
    mode: str = "affine"

    @property
    def hidden(self) -> int:
        """E."""
        words = self.weights.shape[1]
        return words if self.bits is None else words * 32 // self.bits

    def multiply(self, x: mx.array, active: mx.array | None = None) -> mx.array:
        """x (..., F) @ all rows; or x (..., n) @ those rows that `active` (n,) names."""
        own = self if active is None else self.take(active)
        if own.scales is None:
            return x @ own.weights
        return mx.quantized_matmul(
            x,
            own.weights,
            own.scales,
            own.biases,
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )

    def take(self, which: mx.array | slice) -> Rows:
        """Some of the rows."""
        scales, biases = (None if array is None else array[which] for array in (self.scales, self.biases))
        return replace(self, weights=self.weights[which], scales=scales, biases=biases)

    def unpack(self) -> mx.array:
        """The matrix in floats, (F, E)."""
        if self.scales is None:
            return self.weights
        assert self.group_size is not None and self.bits is not None
        return unpack(self.weights, self.scales, self.biases, self.group_size, self.bits, self.mode)
