"""How many images are enough: the pilot grows shard by shard until every teacher's variances are known.

Images are split into two halves by their key. The normalization is fitted on one half and its output variances are
looked at on the other: they miss 1 by the sampling error of both halves, which is twice that of all images together.
Measured: between 0.78 and 1.14 times the true error. Splitting by image, not by token, matters: tokens of one image
resemble each other, and a split by token would report convergence long before it is there.

Suffixes: k = channels of a target, D = channels of a teacher.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from statsvc.errors import StatsvcError
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from statsvc.plan import Statistics
from statsvc.store.reader import Store

RMS_LIMIT = 0.01
MAX_LIMIT = 0.04
CHECKS_IN_A_ROW = 2

Halves = tuple[Moments[np.ndarray], Moments[np.ndarray]]


@dataclass(frozen=True, slots=True)
class Confidence:
    """The error to expect of the output variances, as a fraction of 1: over all channels, and of the worst."""

    rms: float
    worst: float

    @property
    def enough(self) -> bool:
        return self.rms <= RMS_LIMIT and self.worst <= MAX_LIMIT


def confidence(halves: Halves, method: str, options: dict[str, Any] | None = None) -> Confidence | None:
    """None where the halves are too small to tell. options: of `fit`."""
    first, second = halves
    try:
        matrix_kD = fit(first, method, **(options or {})).matrix
        covariances = first.covariance(), second.covariance()
    except StatsvcError:
        return None
    with threadpool_limits(1):
        fitted_k, seen_k = (np.einsum("kd,kd->k", matrix_kD @ cov_DD, matrix_kD) for cov_DD in covariances)
    missed_k = np.abs(seen_k / fitted_k - 1) / 2
    return Confidence(float(np.sqrt(np.mean(missed_k**2))), float(missed_k.max()))


class Pilot:
    """Takes measured dataset shards in pilot order and says when there are enough of them.

    images  that were measured of the teacher with the fewest; each view counts as one
    """

    def __init__(
        self,
        store: Store,
        teachers: list[str],
        statistics: Statistics,
        method: str,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.shards: list[int] = []
        self.images = 0
        self.halves: dict[tuple[str, str], Halves] = {}
        self._store, self._statistics, self._method, self._options = store, statistics, method, options
        self._teachers = {name: store.teacher(name) for name in teachers}
        self._passed = 0

    def take(self, shard: int) -> None:
        """Add the next shard in pilot order; it must be measured for every teacher."""
        self.shards.append(shard)
        measured = []
        for name, teacher in self._teachers.items():
            commit = self._store.ledger.read("measure", shard, name)
            measured.append(commit.rows if commit else 0)
            for output in teacher.outputs:
                new = teacher.shard_moments(output, shard)
                old = self.halves.get((name, output))
                self.halves[name, output] = (old[0].merge(new[0]), old[1].merge(new[1])) if old else new
        self.images += min(measured)
        if self._statistics.images is None:
            self._passed = self._passed + 1 if all(map(self._passes, self._teachers)) else 0

    @property
    def converged(self) -> bool:
        return self._passed >= CHECKS_IN_A_ROW

    @property
    def complete(self) -> bool:
        """Whether no more shards are needed, as far as the plan's limits say; data may end before."""
        wanted = self._statistics.images
        if wanted is not None:
            return wanted != "all" and self.images >= wanted
        return self.converged or self.images >= self._statistics.max_images

    def _passes(self, teacher: str) -> bool:
        outputs = self._teachers[teacher].outputs
        decisive = "patches" if "patches" in outputs else next(iter(outputs))
        found = confidence(self.halves[teacher, decisive], self._method, self._options)
        return found is not None and found.enough


def pilot_order(names: list[str], seed: int) -> list[str]:
    """The order in which shards are measured: random, but the same for everyone."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())
