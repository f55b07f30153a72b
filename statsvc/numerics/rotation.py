"""Orthogonal matrices that give every output channel the same variance.

Suffixes: D = channels, k = outputs, n = the order of a Hadamard matrix.
"""

from itertools import count
from typing import NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.errors import TransformError
from statsvc.numerics.givens import polish
from statsvc.numerics.hadamard import constructible, construction, hadamard


class Flat(NamedTuple):
    """A matrix [k, k] whose entries all have about the same size, and how it was made.

    matrix / norm is orthogonal: a Hadamard matrix is kept as its signs, with which products are exact sums.
    rotation and hadamard are what an artifact says of it.
    """

    matrix: np.ndarray
    norm: float
    rotation: str
    hadamard: str


def rotation(covariance_DD: np.ndarray) -> np.ndarray:
    """[D, D] float64 orthogonal R = H U^T with all diagonal entries of R covariance R^T equal, for every D.

    H is a normalized Hadamard matrix and U holds the eigenvectors: every row of H weighs every eigenvalue
    by 1/D, so every output variance is their mean. Where no Hadamard matrix of order D is known, H is what `flat`
    gives. Rows are negated so that the diagonal of R is non-negative.

    Source: arXiv:2410.01680, eq. 21-26 and Fig. 4 (signs). Measured: diagonal error at most 1.1e-14 of the mean with
    a Hadamard matrix, 5e-13 without. Raises TransformError for a matrix that is no covariance.
    """
    values_D, axes_DD = principal_axes(np.asarray(covariance_DD, np.float64))
    return along(flat(values_D), axes_DD)


def flat(values_k: np.ndarray) -> Flat:
    """A matrix whose rows weigh these eigenvalues to the same variance: a Hadamard matrix, or nearly one.

    Where there is none of order k: a minor of a larger one, made orthogonal and polished. For k >= 256 measured:
    squared entries at most 1.7/k, participation 1 / (k sum of fourth powers) at least 0.96 on average over the rows.
    """
    dim = len(values_k)
    if constructible(dim):
        return Flat(hadamard(dim).astype(np.float64), float(np.sqrt(dim)), "hadamard", construction(dim))
    order = next(n for n in count(dim) if constructible(n))  # ends: powers of two
    matrix_kk = polish(_minor(order, dim), values_k)
    return Flat(matrix_kk, 1.0, "hadamard minor, givens", f"minor of {construction(order)}")


def along(flat_kk: Flat, axes_Dk: np.ndarray) -> np.ndarray:
    """[k, D] the outputs of a flat matrix on these axes (in columns), with canonical signs."""
    with threadpool_limits(1):
        rows_kD: np.ndarray = flat_kk.matrix @ axes_Dk.T
    rows_kD /= flat_kk.norm
    return non_negative_diagonal(rows_kD)


def _minor(order: int, dim: int) -> np.ndarray:
    """[k, k] orthogonal: a Hadamard matrix without its first n - k rows and columns, made orthogonal again.

    For H / sqrt(n) = [[E, F], [G, M]] that is M - G (P + E)^-1 F with the orthogonal polar factor P of E. With
    E = V S W^T the inverse is W (1 + S)^-1 V^T, well conditioned even for a singular E.

    Rows and columns are shuffled first, always in the same way: blocks of signs in order agree with eigenvalues in
    order, and squared entries up to 2.1/k were measured instead of 1.7/k.
    """
    signs_nn = hadamard(order)[_shuffle(order, 1)][:, _shuffle(order, 2)]
    whole_nn = signs_nn / np.sqrt(order)
    cut = order - dim
    with threadpool_limits(1):
        left_EE, strength_E, right_EE = np.linalg.svd(whole_nn[:cut, :cut])
        bridge_Ek = (right_EE.T / (1 + strength_E)) @ (left_EE.T @ whole_nn[:cut, cut:])
        minor_kk: np.ndarray = whole_nn[cut:, cut:] - whole_nn[cut:, :cut] @ bridge_Ek
    return minor_kk


def _shuffle(n: int, seed: int) -> np.ndarray:
    """A fixed permutation of n: numpy promises the raw stream of a bit generator for all versions to come."""
    return np.argsort(np.random.PCG64(seed).random_raw(n), kind="stable")


def principal_axes(covariance_DD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [D], largest first, and eigenvectors [D, D] in columns with a non-negative diagonal.

    On one BLAS thread: eigh gives other bits with other thread counts, and the digest of a transform
    must depend on the moments alone.
    """
    check_covariance(covariance_DD)
    with threadpool_limits(1):
        values_D, vectors_DD = np.linalg.eigh(covariance_DD)
    return values_D[::-1], non_negative_diagonal(vectors_DD[:, ::-1].T).T


def check_covariance(covariance_DD: np.ndarray) -> None:
    """TransformError unless the matrix is square, finite and symmetric."""
    if covariance_DD.ndim != 2 or covariance_DD.shape[0] != covariance_DD.shape[1] or not len(covariance_DD):
        raise TransformError(f"a covariance is a square matrix [D, D], D at least 1; got shape {covariance_DD.shape}")
    if not np.isfinite(covariance_DD).all():
        raise TransformError("a covariance must be finite; it holds NaN or infinity: take the moments again")
    if not (np.abs(covariance_DD - covariance_DD.T) <= 1e-8 * np.abs(covariance_DD).max(initial=0)).all():
        raise TransformError("a covariance is symmetric; this matrix is not: unpack its upper triangle first")
    if (np.diagonal(covariance_DD) < 0).any():
        raise TransformError(f"variances are not negative; got {np.diagonal(covariance_DD).min():g} on the diagonal")


def non_negative_diagonal(matrix_kD: np.ndarray) -> np.ndarray:
    """The matrix with rows negated where the diagonal was negative: one sign per dimension is free."""
    signs_k = np.where(np.diagonal(matrix_kD) < 0, -1.0, 1.0)
    return np.ascontiguousarray(matrix_kD * signs_k[:, None])
