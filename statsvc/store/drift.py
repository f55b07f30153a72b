"""How far the targets of a dataset shard are from what the pilot promised: mean 0 and variance 1 in every channel.

Features in the teacher's own space are first standardized by the pilot's means and standard deviations.

Suffix: k = channels of a target.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from statsvc.store.arrays import read_chunk
from statsvc.store.commits import Commit
from statsvc.store.reader import Targets


class Drift(NamedTuple):
    """Of one dataset shard's targets, over channels: nothing but sampling error where the shard is like the pilot."""

    shard: int
    rows: int
    mean_rms: float
    variance_mean: float
    variance_min: float
    variance_max: float


class Promise(NamedTuple):
    """What the pilot makes one expect of each channel that is stored."""

    mean_k: np.ndarray
    std_k: np.ndarray


def promise(targets: Targets) -> Promise:
    """Raises NotFound for features in the teacher's space that no standardization was fitted to."""
    if not targets.is_raw:
        return Promise(np.zeros(targets.k), np.ones(targets.k))
    standardize = targets.teacher.transform("standardize", targets.output)
    return Promise(standardize.mean, np.diagonal(standardize.inverse))


def shard_drift(targets: Targets, commit: Commit, promised: Promise) -> Drift | None:
    """From what the cache phase recorded; None for a shard without targets. Raises DamagedObject."""
    if not commit.rows:
        return None
    backend = targets.teacher.store.backend
    mean_k, var_k = (
        read_chunk(backend, targets.specs[name], commit.shard, commit)[0].astype(np.float64)
        for name in ("target_mean", "target_var")
    )
    mean_k, var_k = (mean_k - promised.mean_k) / promised.std_k, var_k / promised.std_k**2
    rms = float(np.sqrt((mean_k**2).mean()))
    return Drift(commit.shard, commit.rows, rms, float(var_k.mean()), float(var_k.min()), float(var_k.max()))
