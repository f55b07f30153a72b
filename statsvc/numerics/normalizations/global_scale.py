"""Global standardization: one mean and one scale for all channels and positions."""

import numpy as np

from statsvc.errors import CannotFit
from statsvc.numerics.moments import Moments
from statsvc.numerics.transform import Transform


def fit_global(moments: Moments[np.ndarray]) -> Transform:
    """y = (x - mu_g) / sigma_g, two scalars taken over all positions and channels.

    sigma_g^2 = mean of the channel variances + population variance of the channel means.

    Source: arXiv:2410.01680, eq. 5 and 45. Raises CannotFit for features that are one constant.
    """
    dim = len(moments.mean)
    variance = np.diagonal(moments.covariance()).mean() + moments.mean.var()
    sigma = float(np.sqrt(variance))
    if not sigma > 0:
        raise CannotFit(f"global needs features that vary; all {moments.count} feature vectors are one constant")
    return Transform(
        method="global",
        mean=np.full(dim, moments.mean.mean()),
        matrix=np.eye(dim) / sigma,
        inverse=np.eye(dim) * sigma,
        count=moments.count,
        alpha=1 / sigma,
    )
