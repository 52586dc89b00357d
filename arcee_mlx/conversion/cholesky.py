"""Cholesky factors block by block: in place, and for sizes at which a BLAS of many threads cannot be relied on.

numpy's own OpenBLAS (0.3.31, two threads) crashes in `np.linalg.cholesky` from 16,384 rows on; AFM-4.5B's MLP has 18,432
neurons. Of blocks of 4,096 it is asked for nothing that large, and the whole needs no second matrix.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
BLOCK = 4096


def factorize(matrix: Floats) -> Floats:
    """Replaces a symmetric positive definite matrix (n, n) by its lower factor L, matrix = L L^T, and returns it.

    Raises:
        np.linalg.LinAlgError: it is not positive definite.
    """
    n = len(matrix)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        own = matrix[start:stop, start:stop]
        own[:] = np.linalg.cholesky(own)
        matrix[start:stop, stop:] = 0
        below = matrix[stop:, start:stop]
        if len(below):
            below[:] = np.linalg.solve(own, below.T).T
        for column in range(stop, n, BLOCK):
            end = min(column + BLOCK, n)
            matrix[column:, column:end] -= below[column - stop :] @ below[column - stop : end - stop].T
    return matrix


def solve_factored(factor: Floats, right: Floats) -> Floats:
    """Solves L L^T x = right (n, m) by the lower factor, in place, and returns x."""
    blocks = [slice(start, min(start + BLOCK, len(factor))) for start in range(0, len(factor), BLOCK)]
    for own in blocks:
        right[own] = np.linalg.solve(factor[own, own], right[own] - factor[own, : own.start] @ right[: own.start])
    for own in reversed(blocks):
        rest = right[own] - factor[own.stop :, own].T @ right[own.stop :]
        right[own] = np.linalg.solve(factor[own, own].T, rest)
    return right
