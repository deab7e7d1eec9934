"""What /metrics tells: counters and histograms in Prometheus' text format.

Where PROMETHEUS_MULTIPROC_DIR is set before this is imported, several processes count together in that folder, and each
tells the numbers of all (see `vitfast.serving.workers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vitfast.serving.batching import Batcher

FOLDER = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable that prometheus_client reads."""
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_OF = ["model", "kind"]
"""What a number is about; the kind of input is image or text."""


class Metrics:
    """The numbers of one server, in a registry of its own."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

        self._registry = registry = CollectorRegistry()
        self._shared = FOLDER in os.environ
        self._watched: dict[tuple[str, ...], tuple[Any, Callable[[], int]]] = {}
        if not self._shared:
            ProcessCollector(registry=registry)  # CPU time and memory
        self._requests = Counter(
            "vitfast_requests", "Requests answered, by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self._duration = Histogram(
            "vitfast_request_seconds", "From header to answer.", ["endpoint"], buckets=_SECONDS, registry=registry
        )
        self._inputs = Counter("vitfast_inputs", "Inputs that the model has seen.", _OF, registry=registry)
        self._batch = Histogram("vitfast_batch_size", "Inputs of a batch.", _OF, buckets=_SIZES, registry=registry)
        self._stage = Histogram(
            "vitfast_stage_seconds",
            "An image's decoding and its time in the queue; a batch's time in the model.",
            [*_OF, "stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._reloads = Counter(
            "vitfast_reloads", "Models loaded anew while serving.", ["model", "result"], registry=registry
        )

        def gauge(name: str, what: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(name, what, labels, registry=registry, multiprocess_mode="livesum")

        self._queue = gauge("vitfast_queue_inputs", "Prepared inputs that wait.", tuple(_OF))
        self._bytes = gauge("vitfast_queue_bytes", "Bytes of requests read and not answered.")
        self._in_flight = gauge("vitfast_requests_in_flight", "Requests being worked on.")

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(endpoint, str(status)).inc()
        self._duration.labels(endpoint).observe(seconds)
        if self._shared:  # another process may be asked for the numbers next
            self._look()

    def stage(self, model: str, kind: str, stage: str, seconds: float) -> None:
        """A stage took so long."""
        self._stage.labels(model, kind, stage).observe(seconds)

    def batches(self, model: str, kind: str) -> Callable[[int, list[float], float], None]:
        """What a batcher tells of its batches (see `vitfast.serving.batching.Batcher`)."""

        def observe(size: int, waits: list[float], seconds: float) -> None:
            self._batch.labels(model, kind).observe(size)
            self._inputs.labels(model, kind).inc(size)
            self.stage(model, kind, "model", seconds)
            for wait in waits:
                self.stage(model, kind, "queue", wait)

        return observe

    def reloads(self, model: str, result: str) -> None:
        """A model was loaded anew, or could not be."""
        self._reloads.labels(model, result).inc()

    def watch_queue(self, model: str, kind: str, batcher: Batcher) -> None:
        """Ask for a queue's length when the numbers are asked for."""
        self._watched[model, kind] = (self._queue.labels(model, kind), lambda: batcher.waiting)

    def watch(self, used_bytes: Callable[[], int], in_flight: Callable[[], int]) -> None:
        """The same of the server as a whole."""
        self._watched["bytes",] = (self._bytes, used_bytes)
        self._watched["in flight",] = (self._in_flight, in_flight)

    def _look(self) -> None:
        for gauge, value in self._watched.values():
            gauge.set(value())

    def text(self) -> tuple[bytes, str]:
        """The numbers now, and their media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest, multiprocess

        self._look()
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry), CONTENT_TYPE_LATEST
