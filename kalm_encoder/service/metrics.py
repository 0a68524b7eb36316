"""The numbers of this process that /metrics shows, in the text format of Prometheus."""

from __future__ import annotations

import time

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder.service.live import LiveTable

BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BUCKETS_PAIRS = (1, 4, 16, 64, 256, 1024)
GONE = 499
"""Status of a request whose client did not wait for the answer."""

REQUESTS = Counter("kalm_requests", "Requests answered", ["path", "status"])
SECONDS = Histogram("kalm_request_seconds", "Until answered", ["path"], buckets=BUCKETS_S)
BATCH_PAIRS = Histogram("kalm_batch_pairs", "Pairs scored in a batch", buckets=BUCKETS_PAIRS)
BATCH_TEXTS = Histogram("kalm_batch_texts", "Texts encoded in a batch", buckets=BUCKETS_PAIRS)
PENDING = Gauge("kalm_pending_requests", "Worked on or waiting")
MATCH_TEXTS = Counter("kalm_match_texts", "Texts looked for in the table", ["found"])
QUEUED = Gauge("kalm_queued", "Pairs and texts that wait for the device", ["kind"])
VERSION = Gauge("kalm_table_version", "Version that is served")
FAILED_SWAPS = Gauge("kalm_failed_swaps", "Failed new versions")
INDEX_BYTES = Gauge("kalm_index_bytes", "Memory of the row index")
DISK_CACHE_BYTES = Gauge("kalm_disk_cache_bytes", "Bytes of the disk cache")
DISK_CACHE_LOOKUPS = Gauge("kalm_disk_cache_lookups", "Rows looked for on disk", ["found"])
HOT_BYTES = Gauge("kalm_hot_bytes", "Memory of repeated passages")
HOT_LOOKUPS = Gauge("kalm_hot_lookups", "Repeated passages looked for", ["found"])


def page(live: LiveTable, pending: int) -> Response:
    """Return all numbers as they are now."""
    PENDING.set(pending)
    FAILED_SWAPS.set(live.failed_swaps)
    if (version := live.current) is not None:
        VERSION.set(version.table.version)
        QUEUED.labels("pairs").set(len(version.decoder.queue))
        if version.encoder is not None:
            QUEUED.labels("texts").set(len(version.encoder.queue))
        held = (version.table.index, version.table.by_text)
        INDEX_BYTES.set(sum(one.nbytes for one in held if one is not None))
        if (cache := version.settings.disk_cache) is not None:
            DISK_CACHE_BYTES.set(cache.nbytes)
            hits, misses = cache.lookups
            DISK_CACHE_LOOKUPS.labels("yes").set(hits)
            DISK_CACHE_LOOKUPS.labels("no").set(misses)
        if (hot := version.decoder.decoder.hot) is not None:
            HOT_BYTES.set(hot.nbytes)
            HOT_LOOKUPS.labels("yes").set(hot.hits)
            HOT_LOOKUPS.labels("no").set(hot.misses)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def count(app: ASGIApp) -> ASGIApp:
    """Return the application, with each of its requests counted and timed.

    A request that was given up because its client had gone counts as status 499, as in nginx.
    """

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        status, began = GONE, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            # The route and not the path: a client could make up any number of paths.
            path = getattr(scope.get("route"), "path", "other")
            REQUESTS.labels(path, str(status)).inc()
            SECONDS.labels(path).observe(time.monotonic() - began)

    return counted
