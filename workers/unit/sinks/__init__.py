"""Where features go in each phase: one file per phase, one line in this table."""

from collections.abc import Callable

from workers.unit.sinks.base import Sink
from workers.unit.sinks.cache import CacheSink
from workers.unit.sinks.measure import MeasureSink

SINKS: dict[str, Callable[..., Sink]] = {
    "measure": MeasureSink,
    "cache": CacheSink,
}
