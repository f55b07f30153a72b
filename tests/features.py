"""Synthetic features with the scales of real teachers, and covariances of every kind.

Suffixes: N = feature vectors, D = channels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]

# arXiv:2410.01680, Table 7: smallest and largest channel mean, smallest and largest channel standard deviation.
TEACHERS = {
    "dfn-clip": (-0.1689, 0.1385, 0.0105, 0.1334),
    "siglip": (-6.8789, 31.25, 0.3813, 21.6875),
    "dinov2": (-3.3945, 4.293, 0.3918, 4.3008),
    "sam": (-62.0312, 19.1719, 2.6953, 31.6094),
}


def teacher_features(teacher: str, count: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """[N, D] with that teacher's range of channel means and deviations, correlated, in float32 as teachers give them."""
    rng = np.random.default_rng(seed)
    least_mean, largest_mean, least_std, largest_std = TEACHERS[teacher]
    mean_D = rng.permutation(np.linspace(least_mean, largest_mean, dim))
    std_D = rng.permutation(np.geomspace(least_std, largest_std, dim))
    # A spectrum that falls by two decades, spread over the channels by a random mixture.
    mix_DD = np.geomspace(1, 0.1, dim)[:, None] * rng.standard_normal((dim, dim))
    mix_DD /= np.linalg.norm(mix_DD, axis=0)
    x_ND = rng.standard_normal((count, dim)) @ mix_DD
    return (x_ND * std_D + mean_D).astype(np.float32)


def wishart(dim: int, count: int, scale_D: Floats | float = 1.0, seed: int = 0) -> Floats:
    """The covariance of `count` Gaussian vectors; without full rank when they are fewer than the channels."""
    x_ND = np.random.default_rng(seed).standard_normal((count, dim)) * scale_D
    x_ND -= x_ND.mean(axis=0)
    covariance_DD: Floats = x_ND.T @ x_ND / (count - 1)
    return (covariance_DD + covariance_DD.T) / 2


def direction(dim: int) -> Floats:
    return np.random.default_rng(dim).standard_normal(dim)


# Every kind of spectrum that a teacher could have, and some that none has.
COVARIANCES: dict[str, Callable[[int], Floats]] = {
    "full rank": lambda dim: wishart(dim, 2 * dim),
    "channel scales over six decades": lambda dim: wishart(dim, 2 * dim, np.geomspace(1e-3, 1e3, dim)),
    "half the rank": lambda dim: wishart(dim, max(dim // 2, 2)),
    "rank one": lambda dim: np.outer(direction(dim), direction(dim)),
    "one living channel": lambda dim: np.diag(np.arange(dim) == dim // 3).astype(np.float64),
    "spiked": lambda dim: 1e-4 * np.eye(dim) + np.outer(direction(dim), direction(dim)),
    "already white": lambda dim: np.eye(dim),
    "tiny": lambda dim: 1e-12 * wishart(dim, 2 * dim),
}
