"""Hadamard whitening: PCA whitening, then a rotation that gives every target the same share of every component."""

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations.whitening import spectrum
from statsvc.numerics.rotation import flat
from statsvc.numerics.transform import Transform


def fit_hca(moments: Moments[np.ndarray], *, eigenvalue_floor: float, max_gain: float) -> Transform:
    """y = H L^-1/2 U^T (x - mean): the covariance of the targets is the identity.

    An error of 1 in any one target is an error of length phi in the features, whichever target it is: all columns
    of the inverse U L^1/2 H^T have that norm. Where there is no Hadamard matrix of this width, H is the one that
    phi-s would use, and this still holds. `spectrum` says what the two options do. Rows are negated so that the
    diagonal of the matrix is non-negative.

    Source: arXiv:2410.01680, eq. 19 and 49. Raises CannotFit where the covariance does not support it.
    """
    values_D, axes_DD = spectrum(moments, "hca", eigenvalue_floor, max_gain)
    flat_DD = flat(values_D)
    share_DD, sigma_D = flat_DD.matrix / flat_DD.norm, np.sqrt(values_D)
    with threadpool_limits(1):
        matrix_DD = (share_DD / sigma_D) @ axes_DD.T
        inverse_DD = (share_DD * sigma_D) @ axes_DD.T
    signs_D1 = np.where(np.diagonal(matrix_DD) < 0, -1.0, 1.0)[:, None]
    return Transform(
        method="hca",
        mean=moments.mean,
        matrix=matrix_DD * signs_D1,
        inverse=np.ascontiguousarray((inverse_DD * signs_D1).T),
        count=moments.count,
        rotation=flat_DD.rotation,
        hadamard=flat_DD.hadamard,
    )
