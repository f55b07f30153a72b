"""PHI-S: a rotation that equalizes the variances of all channels, then one scale for all of them."""

import numpy as np

from statsvc.errors import CannotFit
from statsvc.hadamard import construction
from statsvc.moments import Moments
from statsvc.rotation import rotation
from statsvc.transform import Transform


def fit_phi_s(moments: Moments[np.ndarray]) -> Transform:
    """y = phi^-1 H U^T (x - mean), with phi = sqrt(trace(covariance) / D).

    Every output channel has variance exactly 1 and nothing is distorted: the map is a rotation times one scalar,
    so it stays well behaved for covariances without full rank.

    Source: arXiv:2410.01680, eq. 21-26 and 50. Raises CannotFit for features without any variance and
    NoHadamardMatrix for widths without a known Hadamard matrix.
    """
    covariance_DD = moments.covariance()
    dim = len(covariance_DD)
    phi = float(np.sqrt(np.trace(covariance_DD) / dim))
    if not phi > 0:
        raise CannotFit(f"phi-s needs features that vary; all {moments.count} feature vectors are equal")
    rotation_DD = rotation(covariance_DD)
    return Transform(
        method="phi-s",
        mean=moments.mean,
        matrix=rotation_DD / phi,
        inverse=np.ascontiguousarray(rotation_DD.T) * phi,
        count=moments.count,
        alpha=1 / phi,
        rotation="hadamard",
        hadamard=construction(dim),
    )
