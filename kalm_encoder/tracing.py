"""Spans for OpenTelemetry, of the service and the batch side; free where nobody wants them.

The standard variables say whether and where spans are sent: OTEL_TRACES_EXPORTER or
OTEL_EXPORTER_OTLP_ENDPOINT begin it, OTEL_SDK_DISABLED=true ends it. This is the one module that
knows the packages of OpenTelemetry, and it imports them only then. The provider is our own and not
the global one, with which FastAPI would make spans of its own for the same requests.

Nothing here fails or delays what is traced: spans are queued in memory, a thread of the SDK sends
them, and those that cannot be sent are dropped.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from kalm_encoder.version import __version__

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span as Span
    from opentelemetry.trace import SpanContext as SpanContext

logger = logging.getLogger(__name__)

STOP_S = 2.0
"""Longest time that the end of a process waits for spans to be sent. A collector that hangs costs
every command this time."""
TELL_EVERY_S = 60.0
"""Least time between two log lines that say why spans cannot be sent."""
OTLP_EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
"""Name under which the exporter of each OTLP protocol is registered."""

Attributes = Mapping[str, str | int | float | bool]
NOTHING: nullcontext[None] = nullcontext()
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The X-Request-ID of the request that the current thread works for."""


class _Tracing:
    """The SDK, loaded and begun; see `start`."""

    def __init__(self, service: str, exporters: Iterable[SpanExporter]) -> None:
        from opentelemetry import trace  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import (  # noqa: PLC0415
            TraceContextTextMapPropagator,
        )

        resource = Resource.create({"host.name": socket.gethostname(), "process.pid": os.getpid()})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            named = {"service.name": service, "service.version": __version__}
            resource = resource.merge(Resource(named))
        # Its own exit handler would wait for a collector that hangs.
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter in exporters:
            self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("kalm", __version__)
        self.api = trace
        self.propagator = TraceContextTextMapPropagator()


_on: _Tracing | None = None


def start(service: str, exporter: SpanExporter | None = None) -> None:
    """Begin to make spans, if the environment asks for them; otherwise do nothing.

    What does not work is a warning in the log, and no spans are made.

    Args:
        service: Name of the service, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES has one.
        exporter: Where spans go in any case. None asks the environment.
    """
    global _on
    names = _exporter_names() if exporter is None else []
    if _on is not None or not (names or exporter):
        return
    of_sdk = logging.getLogger("opentelemetry")
    of_sdk.handlers, of_sdk.propagate = [_Seldom()], False
    try:
        _on = _Tracing(service, [exporter] if exporter else map(_load_exporter, names))
    except ImportError as error:
        remedy = "pip install 'kalm-preencode[otel]', or unset the variables OTEL_*"
        logger.warning("the environment asks for traces, but none are sent (%s): %s", error, remedy)
    except Exception as error:  # traces must never stop what they tell of
        logger.warning("no traces are sent: %s: %s", type(error).__name__, error)


def stop(timeout_s: float = STOP_S) -> None:
    """Send what waits, within the time, and make no spans any more."""
    global _on
    if _on is not None:
        ending, _on = _on, None
        # The SDK would wait for 30 s; its threads and this one do not hold the process.
        thread = threading.Thread(target=ending.provider.shutdown, name="kalm-traces", daemon=True)
        thread.start()
        thread.join(timeout_s)


def _exporter_names() -> list[str]:
    """Return the names of the exporters that the environment asks for; none if it asks for none."""
    value = os.environ.get
    if value("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    names = value("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    if not names and any(value(name) for name in endpoints):
        names = "otlp"
    return [name.strip() for name in names.split(",") if name.strip() not in ("", "none")]


def _load_exporter(name: str) -> SpanExporter:
    """Make the exporter that a package registered under a name; it reads its own variables."""
    if name == "otlp":
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", protocol)
        name = OTLP_EXPORTERS.get(protocol, protocol)
    for found in entry_points(group="opentelemetry_traces_exporter", name=name):
        made: SpanExporter = found.load()()
        return made
    raise ImportError(f"no installed package has an exporter {name!r}")


class _Seldom(logging.Handler):
    """Passes a line of the SDK on as one of ours, unless there was one a short time ago.

    With a collector that does not answer, the SDK logs several lines every few seconds.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told = -TELL_EVERY_S

    def emit(self, record: logging.LogRecord) -> None:
        """Pass the line on, or drop it."""
        if (now := time.monotonic()) - self._told >= TELL_EVERY_S:
            self._told = now
            logger.warning("spans are not sent: %s", record.getMessage()[:300])


def entry(
    name: str, carrier: Mapping[str, str], attributes: Attributes, *, is_server: bool = False
) -> AbstractContextManager[Span | None]:
    """Return a context with a span that is a child of another process's, or a root, or with None.

    Args:
        name: Name of the span.
        carrier: The `traceparent` and `tracestate` (W3C Trace Context) that the other process sent;
            without a valid one the span is a root.
        attributes: Attributes of the span.
        is_server: Whether the span is that of a request.
    """
    if _on is None:
        return NOTHING
    kind = _on.api.SpanKind.SERVER if is_server else _on.api.SpanKind.INTERNAL
    return _on.tracer.start_as_current_span(
        name,
        context=_on.propagator.extract(carrier),
        kind=kind,
        attributes=attributes,
        record_exception=False,  # a message may hold what a client sent
        set_status_on_exception=False,
    )


def span(name: str, attributes: Attributes | None = None) -> AbstractContextManager[Span | None]:
    """Return a context with a child of the current span; without one, no span is made."""
    if _on is None or current() is None:
        return NOTHING
    return _on.tracer.start_as_current_span(name, attributes=attributes, record_exception=False)


def current() -> Span | None:
    """Return the current span, or None if there is none that is recorded."""
    found = None if _on is None else _on.api.get_current_span()
    return found if found is not None and found.is_recording() else None


def record(
    name: str,
    parent: Span,
    began_ns: int,
    ended_ns: int,
    attributes: Attributes | None = None,
    links: Sequence[SpanContext] = (),
    error: str | None = None,
) -> SpanContext | None:
    """Make a span of what is over.

    Args:
        name: Name of the span.
        parent: Its parent.
        began_ns: Begin in nanoseconds of Unix time.
        ended_ns: End in nanoseconds of Unix time.
        attributes: Its attributes.
        links: Spans of other requests that it belongs to as well.
        error: What went wrong, if it failed.

    Returns:
        What others need for a link to it; None if no spans are made any more.
    """
    if _on is None:
        return None
    api = _on.api
    made = _on.tracer.start_span(
        name,
        context=api.set_span_in_context(parent),
        attributes=attributes,
        links=[api.Link(link) for link in links],
        start_time=began_ns,
    )
    if error is not None:
        fail(made, error)
    made.end(max(began_ns, ended_ns))
    return made.get_span_context()


def fail(failed: Span, error: str) -> None:
    """Mark a span as failed, with a word for the kind of error."""
    if _on is not None:
        failed.set_attribute("error.type", error)
        failed.set_status(_on.api.StatusCode.ERROR)


def response_header(answered: Span) -> str:
    """Return the value of `traceresponse` (W3C Trace Context, editor's draft) for a span."""
    context = answered.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def trace_id() -> str:
    """Return the id of the current trace in hexadecimal, or "" if there is none."""
    if _on is None:
        return ""
    context = _on.api.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""
