"""Blocked Cholesky factors: those of numpy, in place, for every way a size falls into blocks."""

import numpy as np
import pytest

from arcee_mlx.conversion import cholesky


@pytest.mark.parametrize("block", [7, 16, 50, 64])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_blocks_give_numpys_factor_in_place_and_solve(monkeypatch, block, dtype):
    monkeypatch.setattr(cholesky, "BLOCK", block)
    rng = np.random.default_rng(block)
    root = rng.normal(size=(50, 50))
    matrix = (root @ root.T + np.eye(50)).astype(dtype)
    given, right = matrix.copy(), rng.normal(size=(50, 6)).astype(dtype)
    factor = cholesky.factorize(given)
    assert factor is given and factor.dtype == dtype
    tolerance = 1e-3 if dtype == np.float32 else 1e-10
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrix.astype(np.float64)), atol=tolerance)
    solved = cholesky.solve_factored(factor, right.copy())
    np.testing.assert_allclose(matrix.astype(np.float64) @ solved, right, atol=100 * tolerance)


def test_a_matrix_that_is_not_positive_definite_is_an_error(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 3)
    matrix = np.eye(8)
    matrix[6, 6] = -1
    with pytest.raises(np.linalg.LinAlgError):
        cholesky.factorize(matrix)
