"""How a transform is fitted to moments: one file per method, one line in this table."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from statsvc.canonical import sha256
from statsvc.errors import NotFound
from statsvc.moments import Moments
from statsvc.normalizations.global_scale import fit_global
from statsvc.normalizations.phi_s import fit_phi_s
from statsvc.normalizations.standardize import fit_standardize
from statsvc.transform import Transform

METHODS: dict[str, Callable[[Moments[np.ndarray]], Transform]] = {
    "phi-s": fit_phi_s,
    "global": fit_global,
    "standardize": fit_standardize,
}


def fit(moments: Moments[np.ndarray], method: str, *, output: str = "", fingerprint: str = "") -> Transform:
    """Fit a method to moments. output and fingerprint say whose moments they are and enter the digest.

    Raises NotFound for an unknown method, CannotFit where the moments do not support it.
    """
    if method not in METHODS:
        raise NotFound(f"no method {method!r}; there are {', '.join(METHODS)}")
    transform = METHODS[method](moments)
    return replace(transform, output=output, fingerprint=fingerprint, moments_digest=moments_digest(moments))


def moments_digest(moments: Moments[np.ndarray]) -> str:
    """64 hex digits over count (int64), mean and scatter."""
    return sha256(np.asarray(moments.count, np.int64), moments.mean, moments.scatter)
