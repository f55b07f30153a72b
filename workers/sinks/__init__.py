"""Where features go in each phase: one file per phase, one line in this table."""

from collections.abc import Callable

from workers.sinks.base import Sink
from workers.sinks.cache import CacheSink
from workers.sinks.measure import MeasureSink

SINKS: dict[str, Callable[..., Sink]] = {
    "measure": MeasureSink,
    "cache": CacheSink,
}
