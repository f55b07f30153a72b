"""How far the targets of a dataset shard are from what the pilot promised: mean 0 and variance 1 in every channel.

Suffix: k = channels of a target.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from statsvc.arrays import read_chunk
from statsvc.ledger import Commit
from statsvc.targets import Targets


class Drift(NamedTuple):
    """Of one dataset shard's targets, over channels: nothing but sampling error where the shard is like the pilot."""

    shard: int
    rows: int
    mean_rms: float
    variance_mean: float
    variance_min: float
    variance_max: float


def shard_drift(targets: Targets, commit: Commit) -> Drift | None:
    """From what the cache phase recorded; None for a shard without targets. Raises DamagedObject."""
    if not commit.rows:
        return None
    backend = targets.teacher.store.backend
    mean_k, var_k = (
        read_chunk(backend, targets.specs[name], commit.shard, commit)[0].astype(np.float64)
        for name in ("target_mean", "target_var")
    )
    rms = float(np.sqrt((mean_k**2).mean()))
    return Drift(commit.shard, commit.rows, rms, float(var_k.mean()), float(var_k.min()), float(var_k.max()))
