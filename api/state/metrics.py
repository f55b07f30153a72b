"""What Prometheus scrapes: requests, bytes and latencies as they happen, the store's gauges when it asks."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.state.counts import Counts
from statsvc.errors import StatsvcError

STATES = ("waiting", "running", "stopped", "finished")


class Metrics:
    """One app's metrics, in a registry of their own."""

    def __init__(self, counts: Counts) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "statsvc_http_requests", "Requests answered", ["method", "route", "status"], registry=self.registry
        )
        self.bytes = Counter(
            "statsvc_http_response_bytes", "Bytes of bodies handed to clients", ["route"], registry=self.registry
        )
        self.seconds = Histogram(
            "statsvc_http_request_duration_seconds", "From the request's headers to the last byte handed over",
            ["route"], registry=self.registry, buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )  # fmt: skip
        self.in_progress = Gauge("statsvc_http_requests_in_progress", "Requests being answered", registry=self.registry)
        self.refused = Counter("statsvc_http_refused", "Requests told to come back: too many", registry=self.registry)
        self.registry.register(_StoreCollector(counts))
        self._answered: dict[tuple[str, str, int], tuple[Counter, Counter, Histogram]] = {}

    def count(self, method: str, route: str, status: int, nbytes: int, seconds: float) -> None:
        """One answer. What labels name is looked up once: it takes longer than counting does."""
        try:
            requests, sent, took = self._answered[method, route, status]
        except KeyError:
            requests, sent, took = self._answered[method, route, status] = (
                self.requests.labels(method, route, status), self.bytes.labels(route), self.seconds.labels(route)
            )  # fmt: skip
        requests.inc()
        sent.inc(nbytes)
        took.observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _StoreCollector(Collector):
    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def describe(self) -> list[Metric]:
        return []  # which keeps the registry from counting the store when this is registered

    def collect(self) -> Iterator[Metric]:
        damaged = GaugeMetricFamily("statsvc_store_damaged", "1 where nothing can be counted; /readyz says why")
        try:
            progress = self._counts.progress()
        except (StatsvcError, OSError):  # whoever watches the service must hear of it, and of the rest
            damaged.add_metric([], 1)
            yield damaged
            return
        damaged.add_metric([], 0)
        yield damaged
        state = GaugeMetricFamily("statsvc_run_state", "1 for the state the run is in", labels=["state"])
        for name in STATES:
            state.add_metric([name], float(progress["state"] == name))
        yield state
        shards = GaugeMetricFamily("statsvc_dataset_shards", "Dataset shards", labels=["state"])
        for name, count in progress["dataset_shards"].items():
            if count is not None:
                shards.add_metric([name], count)
        yield shards
        yield GaugeMetricFamily("statsvc_samples", "Samples indexed", value=progress["samples"])
        yield GaugeMetricFamily(
            "statsvc_run_rows_per_second", "Rows measured and cached", value=progress["rows_per_second"]
        )
        measured = GaugeMetricFamily("statsvc_measured_rows", "Rows in the moments", labels=["teacher"])
        fitted = GaugeMetricFamily("statsvc_fitted", "1 once the transforms are fitted", labels=["teacher"])
        rows = GaugeMetricFamily(
            "statsvc_cached_rows", "Rows in the cache, by status", labels=["teacher", "set", "status"]
        )
        nbytes = GaugeMetricFamily("statsvc_cached_bytes", "Bytes in the cache", labels=["teacher", "set"])
        for name, teacher in progress["teachers"].items():
            measured.add_metric([name], teacher["measured"]["rows"])
            fitted.add_metric([name], float(teacher["fitted"]))
            for set_, cached in teacher["cached"].items():
                nbytes.add_metric([name, set_], cached["bytes"])
                for status, count in cached["status"].items():
                    rows.add_metric([name, set_, status], count)
        yield from (measured, fitted, rows, nbytes)
