"""Rotations against their defining properties, evaluated in long double and with other decompositions.

Suffix: D = channels.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statsvc.errors import TransformError
from statsvc.numerics.hadamard import constructible
from statsvc.numerics.rotation import non_negative_diagonal, principal_axes, rotation
from tests.support.features import COVARIANCES, Floats, wishart

EPS = np.finfo(np.float64).eps


def output_variances(matrix_kD: Floats, covariance_DD: Floats) -> Floats:
    """diag(M C M^T), term by term in long double where there is one: no BLAS, and digits to spare."""
    wide_kD, wide_DD = matrix_kD.astype(np.longdouble), covariance_DD.astype(np.longdouble)
    variances: Floats = np.einsum("ki,ij,kj->k", wide_kD, wide_DD, wide_kD, optimize=False)
    return variances


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 7, 12, 20, 28, 43, 48])
@pytest.mark.parametrize("kind", COVARIANCES)
def test_all_outputs_have_the_mean_variance(kind: str, dim: int) -> None:
    covariance_DD = COVARIANCES[kind](dim)
    rotation_DD = rotation(covariance_DD)
    assert rotation_DD.dtype == np.float64
    mean = np.trace(covariance_DD) / dim
    # A product of two orthogonal matrices errs by D ulps at the very most; DESIGN.md asks for 1e-12.
    # Without a Hadamard matrix, rows count as done when they are within 1e-14 and the last takes what is left of all.
    bound = min(1e-12, 8 * dim * EPS) if constructible(dim) else dim * 1e-14
    assert np.abs(output_variances(rotation_DD, covariance_DD) - mean).max() <= bound * mean


@pytest.mark.parametrize("dim", [1, 2, 4, 12, 37, 48, 192])
@pytest.mark.parametrize("kind", COVARIANCES)
def test_rotations_are_orthogonal_with_a_non_negative_diagonal(kind: str, dim: int) -> None:
    rotation_DD = rotation(COVARIANCES[kind](dim))
    assert np.abs(rotation_DD @ rotation_DD.T - np.eye(dim)).max() <= 1e-13
    assert np.all(np.diagonal(rotation_DD) >= 0)


@pytest.mark.parametrize("kind", ["full rank", "half the rank", "spiked"])
def test_every_output_takes_the_same_share_of_every_principal_axis(kind: str) -> None:
    """R = H U^T with entries of H +-1/sqrt(D): outputs are equal for any eigenvalues on these axes."""
    covariance_DD = COVARIANCES[kind](48)
    _, axes_DD = principal_axes(covariance_DD)
    share_DD = rotation(covariance_DD) @ axes_DD
    assert np.abs(np.abs(share_DD) * np.sqrt(48) - 1).max() <= 1e-13


@pytest.mark.parametrize("kind", COVARIANCES)
def test_principal_axes_diagonalize_largest_first_with_canonical_signs(kind: str) -> None:
    covariance_DD = COVARIANCES[kind](48)
    values_D, axes_DD = principal_axes(covariance_DD)
    assert np.all(np.diff(values_D) <= 0)
    assert np.all(np.diagonal(axes_DD) >= 0)
    scale = np.abs(covariance_DD).max()
    assert np.abs(axes_DD.T @ axes_DD - np.eye(48)).max() <= 1e-13
    assert np.abs((axes_DD * values_D) @ axes_DD.T - covariance_DD).max() <= 1e-13 * 48 * scale
    # The singular values of a covariance are its eigenvalues, by another algorithm.
    singular_D = np.linalg.svd(covariance_DD, compute_uv=False)
    assert np.abs(values_D - singular_D).max() <= 1e-13 * singular_D[0]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_signs_are_made_canonical_row_by_row_and_once_for_all(seed: int, dim: int) -> None:
    matrix_DD = np.random.default_rng(seed).standard_normal((dim, dim))
    canonical_DD = non_negative_diagonal(matrix_DD)
    for row, canonical in zip(matrix_DD, canonical_DD, strict=True):
        assert np.array_equal(canonical, row) or np.array_equal(canonical, -row)
    assert np.all(np.diagonal(canonical_DD) >= 0)
    assert np.array_equal(non_negative_diagonal(canonical_DD), canonical_DD)
    assert np.array_equal(non_negative_diagonal(-matrix_DD), canonical_DD)


def test_the_covariance_is_left_as_it_was() -> None:
    covariance_DD = wishart(12, 30)
    before_DD = covariance_DD.copy()
    rotation(covariance_DD)
    assert np.array_equal(covariance_DD, before_DD)


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (np.zeros(4), "square"),
        (np.zeros((4, 8)), "square"),
        (np.zeros((0, 0)), "D at least 1"),
        (np.full((4, 4), np.nan), "finite"),
        (np.diag([1, 1, 1, np.inf]), "finite"),
        (np.triu(wishart(4, 9)), "symmetric"),
    ],
)
def test_what_is_no_covariance_is_refused(matrix: Floats, reason: str) -> None:
    with pytest.raises(TransformError, match=reason):
        rotation(matrix)
