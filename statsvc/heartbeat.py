"""Is a driver at work on a store? Its heartbeat alone tells: it may run on another machine."""

from __future__ import annotations

import json
import time

from statsvc.backends import Backend
from statsvc.layout import LEASE, LEASE_SECONDS


def driven_since(storage: Backend) -> float | None:
    """Seconds since the last heartbeat of a driver that works on the store, as it seems; None where there is none."""
    try:
        age = time.time() - json.loads(storage.read(LEASE))["heartbeat"]
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError, OverflowError):
        return None
    # One from the future was written before a clock was set.
    return max(age, 0.0) if -LEASE_SECONDS <= age <= LEASE_SECONDS else None
