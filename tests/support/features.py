"""Synthetic features with the scales of real teachers, and covariances of every kind.

Suffixes: N = feature vectors, D = channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


class Scales(NamedTuple):
    """What arXiv:2410.01680 reports of a teacher's features."""

    least_mean: float  # of a channel, Table 7
    largest_mean: float
    least_std: float
    largest_std: float
    global_mean: float  # over all channels, Table 7
    alpha_global: float  # 1 / sigma_g, Table 8
    alpha_phi_s: float  # 1 / phi, Table 8


TEACHERS = {
    "dfn-clip": Scales(-0.1689, 0.1385, 0.0105, 0.1334, 0.0049, 35.02, 41.41),
    "siglip": Scales(-6.8789, 31.25, 0.3813, 21.6875, 0.0211, 0.53, 0.65),
    "dinov2": Scales(-3.3945, 4.293, 0.3918, 4.3008, 0.0055, 0.73, 0.76),
    "sam": Scales(-62.0312, 19.1719, 2.6953, 31.6094, 1.1475, 0.19, 0.21),
}


def teacher_features(teacher: str, count: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """[N, D] correlated features with that teacher's scales, in float32 as teachers give them.

    Most channels are alike and few reach the extremes of mean and deviation: so few that sigma_g and phi are right.
    """
    rng = np.random.default_rng(seed)
    mean_D, std_D = channel_scales(teacher, dim)
    # A spectrum that falls by two decades, spread over the channels by a random mixture.
    mix_DD = np.geomspace(1, 0.1, dim)[:, None] * rng.standard_normal((dim, dim))
    mix_DD /= np.linalg.norm(mix_DD, axis=0)
    x_ND = rng.standard_normal((count, dim)) @ mix_DD * rng.permutation(std_D) + rng.permutation(mean_D)
    features_ND: NDArray[np.float32] = x_ND.astype(np.float32)
    return features_ND


def channel_scales(teacher: str, dim: int) -> tuple[Floats, Floats]:
    """[D] means and [D] deviations of channels, both ascending, with that teacher's extremes, sigma_g and phi."""
    scales = TEACHERS[teacher]
    rank_D = np.linspace(0, 1, dim)
    side_D = 2 * rank_D - 1
    reach_D = np.where(side_D < 0, scales.global_mean - scales.least_mean, scales.largest_mean - scales.global_mean)
    phi = 1 / scales.alpha_phi_s

    def stds(power: float) -> Floats:
        return scales.least_std * (scales.largest_std / scales.least_std) ** rank_D**power

    def means(power: float) -> Floats:
        return scales.global_mean + np.sign(side_D) * np.abs(side_D) ** power * reach_D

    std_D = stds(_root(lambda power: float(np.mean(stds(power) ** 2) - phi**2)))
    mean_D = means(_root(lambda power: float(means(power).var() - (scales.alpha_global**-2 - phi**2))))
    return mean_D, std_D


def _root(falling: Callable[[float], float]) -> float:
    """Where a falling function of a power is zero, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return low


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
