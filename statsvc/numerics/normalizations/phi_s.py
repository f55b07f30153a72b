"""PHI-S: a rotation that equalizes the variances of all channels, then one scale for all of them.

Suffixes: D = channels of the teacher, k = channels of the target.
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.errors import CannotFit, PlanError
from statsvc.numerics.givens import polish
from statsvc.numerics.moments import Moments
from statsvc.numerics.rotation import along, check_covariance, flat, principal_axes
from statsvc.numerics.transform import Transform


def fit_phi_s(moments: Moments[np.ndarray], *, rank: int | None = None, near: Transform | None = None) -> Transform:
    """y = phi^-1 H U^T (x - mean), with phi = sqrt(trace(covariance) / D).

    Every output channel has variance exactly 1 and nothing is distorted: the map is a rotation times one scalar,
    so it stays well behaved for covariances without full rank. Where there is no Hadamard matrix of that width, H is
    nearly one; `statsvc.numerics.rotation` says how.

    rank=k keeps the k leading principal components: U has k columns, phi^2 is the mean of their eigenvalues, and
    what features hold along the others is lost: inverting gives the mean there, and the squared error per feature
    vector is the sum of the other eigenvalues.

    near=old turns the rotation of `old` as little as it takes to equalize the variances on these moments, so that the
    targets resemble the old ones; a fit that starts afresh turns almost completely when the covariance changes
    slightly. Signs follow the old one. With a rank, the old k directions are first turned into the k leading ones.

    Source: arXiv:2410.01680, eq. 21-26 and 50. Raises CannotFit for features without any variance and for a rank
    beyond their width, PlanError where `near` is no transform that this one could resemble.
    """
    covariance_DD = moments.covariance()
    check_covariance(covariance_DD)
    dim = len(covariance_DD)
    if near is not None:
        _check_near(near, dim, rank)
        rank = near.rank
    k = dim if rank is None else rank
    if not isinstance(k, int | np.integer) or isinstance(k, bool) or not 1 <= k <= dim:
        raise CannotFit(f"phi-s takes a rank from 1 to the width of the features, {dim}; got {k!r}")
    phi = float(np.sqrt(np.trace(covariance_DD) / dim))
    if not phi > 0:
        raise CannotFit(f"phi-s needs features that vary; all {moments.count} feature vectors are equal")
    if near is not None and k == dim:
        rows_kD = polish(_rotation_of(near), covariance_DD)
        made = f"near {near.digest[:12]}", near.hadamard
    else:
        values_D, axes_DD = principal_axes(covariance_DD)
        values_k, axes_Dk = values_D[:k], axes_DD[:, :k]
        phi = phi if k == dim else float(np.sqrt(values_k.mean()))
        if near is None:
            flat_kk = flat(values_k)
            rows_kD, made = along(flat_kk, axes_Dk), (flat_kk.rotation, flat_kk.hadamard)
        else:
            rows_kD = _turned_into(axes_Dk, values_k, near)
            made = f"near {near.digest[:12]}", near.hadamard
    return Transform(
        method="phi-s",
        mean=moments.mean,
        matrix=rows_kD / phi,
        inverse=np.ascontiguousarray(rows_kD.T) * phi,
        count=moments.count,
        alpha=1 / phi,
        rotation=made[0],
        hadamard=made[1],
    )


def _check_near(near: Transform, dim: int, rank: int | None) -> None:
    """PlanError unless a phi-s of that width and rank can resemble `near`."""
    if not isinstance(near, Transform):
        raise PlanError(f"near takes a Transform, such as store.transform(digest); got {near!r}")
    if near.method != "phi-s":
        raise PlanError(f"near takes a phi-s transform; got {near.method}: leave it out")
    if len(near.mean) != dim:
        raise PlanError(f"near takes a transform of features as wide as these, {dim}; got {len(near.mean)}")
    if rank not in (None, near.rank):
        raise PlanError(f"near takes a transform with the same rank; got {near.rank} for rank={rank}: leave one out")


def _rotation_of(near: Transform) -> np.ndarray:
    """[D, D] the rotation in a transform, with the rounding of its scale and of its storage taken out."""
    rotation_DD = near.matrix * np.sqrt(near.rank) / np.linalg.norm(near.matrix)
    with threadpool_limits(1):
        # One step of Newton and Schulz towards the nearest orthogonal matrix.
        orthogonal_DD: np.ndarray = 1.5 * rotation_DD - 0.5 * (rotation_DD @ rotation_DD.T) @ rotation_DD
    return orthogonal_DD


def _turned_into(axes_Dk: np.ndarray, values_k: np.ndarray, near: Transform) -> np.ndarray:
    """[k, D] orthonormal rows on these axes, nearest to those of a transform, then equalized.

    Source: the orthogonal Procrustes problem, Schoenemann (1966).
    """
    with threadpool_limits(1):
        left_kk, _, right_kk = np.linalg.svd(near.matrix @ axes_Dk)
        rows_kD: np.ndarray = polish(left_kk @ right_kk, values_k) @ axes_Dk.T
    return rows_kD
