"""What Prometheus is told: latency, batches, the queue, proven and empty answers, the catalogue's version."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
USERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Measures:
    """The numbers of one service, in a registry of its own.

    Args:
        queue: Says how many users wait.
        catalogue: Says the number of the catalogue's version and of its items.
    """

    def __init__(self, queue: Callable[[], int], catalogue: Callable[[], tuple[int, int]]) -> None:
        self.registry = registry = CollectorRegistry()

        def gauge(name: str, text: str, value: Callable[[], float]) -> None:
            Gauge(name, text, registry=registry).set_function(value)

        labels = ["path", "status"]
        self.requests = Counter("triewise_requests", "Answered requests.", labels, registry=registry)
        self.seconds = Histogram(
            "triewise_request_seconds",
            "From the first byte to the answer.",
            ["path"],
            buckets=SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "triewise_batch_users", "Users decoded together.", buckets=USERS, registry=registry
        )
        self.results = Counter("triewise_results", "Lists of titles.", ["certified"], registry=registry)
        self.empty = Counter("triewise_empty_results", "Lists without a title.", registry=registry)
        gauge("triewise_queue_users", "Users who wait.", queue)
        gauge("triewise_catalog_version", "Of the catalogue in use.", lambda: catalogue()[0])
        gauge("triewise_catalog_items", "In the catalogue in use.", lambda: catalogue()[1])

    def request(self, path: str, status: int, seconds: float) -> None:
        """One request is answered."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def answered(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Some histories got their titles."""
        for result in results:
            self.results.labels(str(result["certified"]).lower()).inc()
            self.empty.inc(not result["items"])

    def text(self) -> bytes:
        """All of it as Prometheus reads it."""
        return generate_latest(self.registry)
