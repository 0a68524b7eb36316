"""The spans of a request, and the headers by which its client finds them.

A request has a span of the kind server. Its children are `take` (rows are read), `queue` (it waits
for a thread or the device), and `decode` or `encode` (a batch on the device). Requests share
batches: each has the span of a batch as a child of its own, so that no trace has a gap. That of the
first of them links to the spans of all the other requests, and theirs link back to it.
"""

from __future__ import annotations

import re
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kalm_encoder import tracing
from kalm_encoder.service.problems import answer_problem

if TYPE_CHECKING:
    from kalm_encoder.tracing import Attributes, Span, SpanContext

UNTRACED = {"/health", "/metrics"}
"""Paths that are asked every few seconds and say nothing of a request."""
OWN_ID = re.compile(r"[!-~]{1,128}")
"""The X-Request-ID of a client that is kept: anything that fits into a log line as one word."""
HEADERS = ("X-Request-ID", "traceresponse")
"""Headers of an answer that name its request and its trace."""
HEADERS_IN = ("X-Request-ID", "traceparent", "tracestate")
"""Headers of a request that do so."""


@dataclass(eq=False)
class Waiting:
    """Items of a request that wait in a queue.

    Attributes:
        request: The span of the request.
        since: When they were queued, in nanoseconds of Unix time.
        is_waiting: Whether none of them was taken yet.
    """

    request: Span
    since: int = field(default_factory=time.time_ns)
    is_waiting: bool = True

    def taken(self, queue: str, now: int) -> None:
        """Record the time in the queue, the first time that some of the items are taken."""
        if self.is_waiting:
            self.is_waiting = False
            tracing.record("queue", self.request, self.since, now, {"kalm.queue": queue})


def waiting() -> Waiting | None:
    """Return what waits from now on for the current request; None if it is not traced."""
    request = tracing.current()
    return None if request is None else Waiting(request)


def record_batch(
    name: str, began: int, items: Sequence[Waiting | None], tokens: int, computed: int
) -> None:
    """Record a batch, which ends now, for each request that has a share in it.

    Args:
        name: What was done, which is the name of the queue as well.
        began: When it began, in nanoseconds of Unix time.
        items: What each item of the batch belongs to; None for a request that is not traced.
        tokens: Number of tokens and states of the items.
        computed: The same with padding.
    """
    now = time.time_ns()
    batch: dict[str, int | float] = {
        "kalm.batch.size": len(items),
        "kalm.batch.requests": len({*items}),
        "kalm.batch.tokens": tokens,
        "kalm.batch.padding": max(0.0, 1 - tokens / computed) if computed else 0.0,
    }
    shares = Counter(item for item in items if item is not None)
    first: SpanContext | None = None
    for one, share in shares.items():
        one.taken(name, began)
        links = [first] if first else [o.request.get_span_context() for o in shares if o is not one]
        made = tracing.record(name, one.request, began, now, {**batch, "kalm.items": share}, links)
        first = first or made


def trace(app: ASGIApp, names_request: bool = True) -> ASGIApp:
    """Return the application with a span per request, whose id and trace the answer names.

    An error that no handler knows is answered here, so that its log line has the id and the trace.

    Args:
        app: The application.
        names_request: Whether answers get an X-Request-ID; the proxy of Ray Serve adds one itself.
    """

    async def traced(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        headers = Headers(raw=scope["headers"])
        own = headers.get("x-request-id", "")
        own = own if OWN_ID.fullmatch(own) else ""
        if scope["path"] in UNTRACED:
            await answer(scope, receive, send, own, None)
            return
        given = {name: ",".join(headers.getlist(name)) for name in HEADERS_IN[1:]}
        with tracing.entry(scope["method"], given, _asked(scope), is_server=True) as span:
            await answer(scope, receive, send, own, span)

    async def answer(
        scope: Scope, receive: Receive, send: Send, own: str, span: Span | None
    ) -> None:
        id = own or tracing.trace_id() or uuid.uuid4().hex
        status: int | None = None

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                said = MutableHeaders(raw=message.setdefault("headers", []))
                if names_request:
                    said["X-Request-ID"] = id
                if span is not None:
                    said["traceresponse"] = tracing.response_header(span)
            await send(message)

        token = tracing.REQUEST_ID.set(id)
        failed = "client_gone"
        try:
            await app(scope, receive, noted)
            failed = "" if status is not None and status < 500 else str(status or failed)
        except Exception as error:
            failed = type(error).__qualname__
            response = await answer_problem(Request(scope), error)
            if status is None:
                await response(scope, receive, noted)
            raise
        finally:
            if span is not None:
                _finish(span, scope, status, failed)
                span.set_attribute("kalm.request_id", id)
            tracing.REQUEST_ID.reset(token)

    return traced


def _asked(scope: Scope) -> Attributes:
    """Return the attributes that a request has from its begin."""
    server = scope.get("server") or ("", 0)
    return {
        "http.request.method": scope["method"],
        "url.path": scope["path"],
        "url.scheme": scope.get("scheme", "http"),
        "network.protocol.version": scope.get("http_version", "1.1"),
        "server.address": server[0],
        "server.port": server[1] or 0,
    }


def _finish(span: Span, scope: Scope, status: int | None, failed: str) -> None:
    """Add what is known at the end of a request: its route, its status and what failed."""
    if (path := getattr(scope.get("route"), "path", None)) is not None:
        span.update_name(f"{scope['method']} {path}")
        span.set_attribute("http.route", path)
    if status is not None:
        span.set_attribute("http.response.status_code", status)
    if failed:
        tracing.fail(span, failed)
