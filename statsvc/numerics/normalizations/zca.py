"""ZCA whitening: the whitening that changes the features least."""

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations.whitening import spectrum
from statsvc.numerics.transform import Transform


def fit_zca(moments: Moments[np.ndarray], *, eigenvalue_floor: float, max_gain: float) -> Transform:
    """y = U L^-1/2 U^T (x - mean): the covariance of the targets is the identity, and the matrix is symmetric.

    `spectrum` says what the two options do.

    Source: arXiv:2410.01680, eq. 8, 12 and 48. Raises CannotFit where the covariance does not support it.
    """
    values_D, axes_DD = spectrum(moments, "zca", eigenvalue_floor, max_gain)
    return Transform(
        method="zca",
        mean=moments.mean,
        matrix=_power(values_D, axes_DD, -0.5),
        inverse=_power(values_D, axes_DD, 0.5),
        count=moments.count,
    )


def _power(values_D: np.ndarray, axes_DD: np.ndarray, exponent: float) -> np.ndarray:
    """[D, D] U L^exponent U^T, symmetric to the last bit."""
    with threadpool_limits(1):
        power_DD: np.ndarray = (axes_DD * values_D**exponent) @ axes_DD.T
    symmetric_DD: np.ndarray = (power_DD + power_DD.T) / 2
    return symmetric_DD
