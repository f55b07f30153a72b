"""What pca, zca and hca share: the eigenvalues they divide by, and when they must not.

Suffix: D = channels.
"""

from __future__ import annotations

import numpy as np

from statsvc.errors import CannotFit
from statsvc.numerics.moments import Moments
from statsvc.numerics.rotation import principal_axes


def spectrum(
    moments: Moments[np.ndarray], method: str, eigenvalue_floor: float, max_gain: float
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues [D], largest first, raised to the floor, and their axes [D, D] in columns.

    With phi^2 the mean eigenvalue, the floor is eigenvalue_floor * phi^2. Along an axis that was raised to it the
    variance of the targets is below 1; the map stays exactly invertible, since both ways use the raised value.

    Raises CannotFit where a gain phi / sqrt(eigenvalue) exceeds max_gain after that, where an eigenvalue cannot be told
    from the rounding of the largest, where most of them had to be raised, which whitens nothing, and for no more
    feature vectors than channels, as what a floor makes of directions that were never seen is no statistic.
    """
    covariance_DD = moments.covariance()
    values_D, axes_DD = principal_axes(covariance_DD)
    dim = len(values_D)
    mean = float(np.trace(covariance_DD) / dim)
    if not mean > 0:
        raise CannotFit(f"{method} needs features that vary; all {moments.count} feature vectors are equal")
    way_out = "set whitening.eigenvalue_floor in the plan, or use phi-s or global"
    if moments.count <= dim:
        raise CannotFit(
            f"{method} needs more feature vectors than channels; {moments.count} of width {dim} have no variance in "
            f"at least {dim - moments.count + 1} directions: measure more images, or use phi-s or global"
        )
    raised_D = np.maximum(values_D, eigenvalue_floor * mean)
    if eigenvalue_floor and (raised := int(np.sum(raised_D > values_D))) > dim // 2:
        raise CannotFit(
            f"{method} would raise {raised} of {dim} eigenvalues to {eigenvalue_floor:g} of their mean, and most must "
            "stand by themselves: use phi-s or global, or a smaller whitening.eigenvalue_floor in the plan"
        )
    # A floor and a max_gain that mean the same, such as 1e-6 and 1000, agree but for their rounding.
    allowed = mean / max_gain / max_gain * (1 - 1e-9)
    rounding = dim * np.finfo(np.float64).eps * float(values_D[0])  # eigh errs by about this much in all of them
    if low := int(np.sum(raised_D < max(allowed, rounding))):
        reason = f"multiply them by more than max_gain, {max_gain:g} times the gain of phi-s"
        if rounding > allowed:
            reason = "divide by what may be rounding"
        raise CannotFit(
            f"{method} takes no eigenvalues below {max(allowed, rounding) / mean:.3g} of their mean; {low} of {dim} "
            f"are, the smallest is {values_D[-1] / mean:.3g}, and it would {reason}: {way_out}"
        )
    return raised_D, axes_DD
