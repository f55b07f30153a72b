"""How a transform is fitted to moments: one file per method, one line in this table."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from statsvc.digests import sha256
from statsvc.errors import NotFound, PlanError
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations.global_scale import fit_global
from statsvc.numerics.normalizations.hca import fit_hca
from statsvc.numerics.normalizations.pca import fit_pca
from statsvc.numerics.normalizations.phi_s import fit_phi_s
from statsvc.numerics.normalizations.standardize import fit_standardize
from statsvc.numerics.normalizations.zca import fit_zca
from statsvc.numerics.transform import Transform


class Method(NamedTuple):
    """fit takes the moments, and by keyword the options of `fit` below that `takes` names."""

    fit: Callable[..., Transform]
    takes: tuple[str, ...] = ()


WHITENING = ("eigenvalue_floor", "max_gain")

METHODS: dict[str, Method] = {
    "phi-s": Method(fit_phi_s, takes=("rank", "near")),
    "global": Method(fit_global),
    "standardize": Method(fit_standardize),
    "pca": Method(fit_pca, takes=WHITENING),
    "zca": Method(fit_zca, takes=WHITENING),
    "hca": Method(fit_hca, takes=WHITENING),
}


def fit(
    moments: Moments[np.ndarray],
    method: str,
    *,
    rank: int | None = None,
    near: Transform | None = None,
    eigenvalue_floor: float = 0.0,
    max_gain: float = 1000.0,
    output: str = "",
    fingerprint: str = "",
) -> Transform:
    """Fit a method to moments. output and fingerprint say whose moments they are and enter the digest.

    rank and near are for phi-s: the channels of a target (None: all, or those of `near`), and an older transform
    whose targets the new ones shall resemble. eigenvalue_floor and max_gain are for pca, zca and hca, relative to
    phi-s and so without a unit: eigenvalues below that fraction of their mean are raised to it, and a fit that would
    multiply any direction by more than max_gain times the gain of phi-s is refused. The other methods leave them aside.

    Raises NotFound for an unknown method, PlanError for options that are wrong or not that method's, CannotFit and
    MomentsError where the moments do not support it.
    """
    if method not in METHODS:
        raise NotFound(f"no method {method!r}; there are {', '.join(METHODS)}")
    options: dict[str, Any] = {
        "rank": rank,
        "near": near,
        "eigenvalue_floor": eigenvalue_floor,
        "max_gain": max_gain,
    }
    takes = METHODS[method].takes
    for name in ("rank", "near"):
        if options[name] is not None and name not in takes:
            raise PlanError(f"{name} is for phi-s, not {method}: leave it out")
    if not eigenvalue_floor >= 0 or not max_gain > 0:  # written this way so that NaN fails too
        raise PlanError(
            "eigenvalue_floor is a fraction, 0 or more, and max_gain a factor above 0; "
            f"got {eigenvalue_floor} and {max_gain}"
        )
    transform = METHODS[method].fit(moments, **{name: options[name] for name in takes})
    return replace(transform, output=output, fingerprint=fingerprint, moments_digest=moments_digest(moments))


def moments_digest(moments: Moments[np.ndarray]) -> str:
    """64 hex digits over count (int64), mean and scatter."""
    return sha256(np.asarray(moments.count, np.int64), moments.mean, moments.scatter)
