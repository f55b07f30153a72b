"""Standardization: every channel by its own mean and standard deviation."""

import numpy as np

from statsvc.errors import CannotFit
from statsvc.numerics.moments import Moments
from statsvc.numerics.transform import Transform


def fit_standardize(moments: Moments[np.ndarray]) -> Transform:
    """y_c = (x_c - mu_c) / sigma_c.

    Source: arXiv:2410.01680, eq. 6 and 46. Raises CannotFit for a channel without variance.
    """
    sigma_D = np.sqrt(np.diagonal(moments.covariance()))
    flat = np.flatnonzero(~(sigma_D > 0))
    if len(flat):
        raise CannotFit(
            f"standardize divides by each channel's standard deviation, and {len(flat)} of {len(sigma_D)} channels "
            f"never vary (first: {flat[0]}): use phi-s or global"
        )
    return Transform(
        method="standardize",
        mean=moments.mean,
        matrix=np.diag(1 / sigma_D),
        inverse=np.diag(sigma_D),
        count=moments.count,
    )
