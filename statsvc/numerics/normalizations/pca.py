"""PCA whitening: principal components, each by its own standard deviation."""

import numpy as np

from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations.whitening import spectrum
from statsvc.numerics.transform import Transform


def fit_pca(moments: Moments[np.ndarray], *, eigenvalue_floor: float, max_gain: float) -> Transform:
    """y = L^-1/2 U^T (x - mean): the covariance of the targets is the identity, largest eigenvalue first.

    Rows of U^T have a non-negative diagonal. `spectrum` says what the two options do.

    Source: arXiv:2410.01680, eq. 10-11 and 47. Raises CannotFit where the covariance does not support it.
    """
    values_D, axes_DD = spectrum(moments, "pca", eigenvalue_floor, max_gain)
    sigma_D = np.sqrt(values_D)
    return Transform(
        method="pca",
        mean=moments.mean,
        matrix=np.ascontiguousarray(axes_DD.T / sigma_D[:, None]),
        inverse=np.ascontiguousarray(axes_DD * sigma_D),
        count=moments.count,
        rotation="pca",
    )
