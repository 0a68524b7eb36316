"""What /metrics shows, in Prometheus' words."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client import generate_latest as generate
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from kalm_encoder.service.live import LiveTable

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PAIRS = (1, 4, 16, 64, 256, 1024)


class Metrics:
    """Counters of one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("kalm_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "kalm_request_seconds", "Until answered", ["path"], buckets=SECONDS, registry=registry
        )
        self.batch = Histogram(
            "kalm_batch_pairs", "Pairs scored together", buckets=PAIRS, registry=registry
        )
        self.pending = Gauge("kalm_pending_requests", "Worked on or waiting", registry=registry)
        self.version = Gauge("kalm_table_version", "Version served", registry=registry)
        self.failed_swaps = Gauge(
            "kalm_failed_swaps", "Live versions that could not be taken over", registry=registry
        )
        self.index_bytes = Gauge("kalm_index_bytes", "Of where rows lie", registry=registry)
        self.hot_bytes = Gauge("kalm_hot_bytes", "Of repeated passages", registry=registry)
        self.hot_lookups = Gauge(
            "kalm_hot_lookups", "Passages looked for", ["found"], registry=registry
        )

    def render(self, live: LiveTable, pending: int) -> bytes:
        """Return all of it, as it is now."""
        self.pending.set(pending)
        self.failed_swaps.set(live.failed_swaps)
        if live.current is not None:
            table = live.current.table
            self.version.set(table.version)
            self.index_bytes.set(table.index.nbytes if table.index else 0)
            if (hot := live.current.decoder.decoder.hot) is not None:
                self.hot_bytes.set(hot.nbytes)
                self.hot_lookups.labels("yes").set(hot.hits)
                self.hot_lookups.labels("no").set(hot.misses)
        return generate(self.registry)

    class Middleware:
        """Counts requests by route and status."""

        def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
            self.app = app
            self.metrics = metrics

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            """Pass a request on and time it."""
            if scope["type"] != "http":
                await self.app(scope, receive, send)
                return
            status, began = 500, time.monotonic()

            async def watched(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await self.app(scope, receive, watched)
            finally:
                route = scope.get("route")
                path = getattr(route, "path", "other")  # never what a client made up
                self.metrics.requests.labels(path, str(status)).inc()
                self.metrics.seconds.labels(path).observe(time.monotonic() - began)
