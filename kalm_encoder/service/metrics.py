"""The numbers that /metrics shows, in the text format of Prometheus."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

from fastapi import Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as generate

from kalm_encoder.service.live import LiveTable

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BUCKETS_PAIRS = (1, 4, 16, 64, 256, 1024)


class Metrics:
    """The counters of one process."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter(
            "kalm_requests", "Requests answered", ["path", "status"], registry=registry
        )
        self.seconds = Histogram(
            "kalm_request_seconds", "Until answered", ["path"], registry=registry, buckets=BUCKETS_S
        )
        self.batch = Histogram(
            "kalm_batch_pairs", "Pairs scored in a batch", registry=registry, buckets=BUCKETS_PAIRS
        )
        self.pending = Gauge("kalm_pending_requests", "Worked on or waiting", registry=registry)
        self.version = Gauge("kalm_table_version", "Version that is served", registry=registry)
        self.failed_swaps = Gauge("kalm_failed_swaps", "Failed new versions", registry=registry)
        self.index_bytes = Gauge("kalm_index_bytes", "Memory of the row index", registry=registry)
        self.hot_bytes = Gauge("kalm_hot_bytes", "Memory of repeated passages", registry=registry)
        self.hot_lookups = Gauge(
            "kalm_hot_lookups", "Repeated passages looked for", ["found"], registry=registry
        )

    def page(self, live: LiveTable, pending: int) -> Response:
        """Return all numbers as they are now."""
        self.pending.set(pending)
        self.failed_swaps.set(live.failed_swaps)
        if (version := live.current) is not None:
            self.version.set(version.table.version)
            self.index_bytes.set(version.table.index.nbytes if version.table.index else 0)
            if (hot := version.decoder.decoder.hot) is not None:
                self.hot_bytes.set(hot.nbytes)
                self.hot_lookups.labels("yes").set(hot.hits)
                self.hot_lookups.labels("no").set(hot.misses)
        return Response(generate(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def count(
        self, request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        """Count and time one request, as a middleware of the application."""
        status, began = 500, time.monotonic()
        try:
            response = await call_next(request)
            status = response.status_code
            return response
        finally:
            # The route and not the path: a client could make up any number of paths.
            path = getattr(request.scope.get("route"), "path", "other")
            self.requests.labels(path, str(status)).inc()
            self.seconds.labels(path).observe(time.monotonic() - began)
