"""Formats log lines, each of which says where it comes from: run, shard, worker, trace, request.

Lines are text or JSON on stderr, in the command and in its workers alike. A process works for one
run at a time, so run and worker belong to the process. The shard belongs to the thread that works
on it (a contextvar), or to one line: `logger.warning(…, extra={"shard": shard.id})`.

The JSON formatter is our own, because a library would be one more dependency of the base install
(`kalm --log-format json status` works there) and would save three lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import uuid
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from kalm_encoder import tracing

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)
NOISY = ("azure", "httpx", "httpx2", "ray", "transformers", "filelock", "huggingface_hub")
"""Loggers of libraries whose INFO lines would hide ours; --debug shows them."""
FIELDS = ("run", "shard", "worker", "trace", "request")
"""The fields by which a line says where it comes from."""


@dataclass(frozen=True)
class LogOptions:
    """The log settings of a process. The driver sends it to its workers.

    Attributes:
        format: "text" or "json".
        level: Lowest level that is shown.
        run: Id of the run, or "" outside of a run.
        worker: Host and process of a worker, or "" in the command itself.
        trace: Id of the trace of the run, or "" without traces.
    """

    format: str = TEXT
    level: int = logging.INFO
    run: str = ""
    worker: str = ""
    trace: str = ""


_options = LogOptions()
_shard: ContextVar[str] = ContextVar("shard", default="")


def current() -> LogOptions:
    """Return how this process logs, so that a worker can do the same."""
    return _options


def configure(options: LogOptions, *, replace_handlers: bool = False) -> None:
    """Log to stderr as the options say.

    Args:
        options: Those of the command line, or what `current` returned in the driver.
        replace_handlers: Whether to replace the handlers that another library has set up. If not,
            they stay and ours is not added.
    """
    global _options
    _options = options
    as_json = options.format == JSON
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    logging.basicConfig(level=options.level, handlers=[handler], force=replace_handlers)
    if options.level > logging.DEBUG:
        for noisy in NOISY:
            logging.getLogger(noisy).setLevel(logging.ERROR)
    if as_json:
        logging.captureWarnings(True)
        # These libraries write to stderr past the logging. They read this when they are imported.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def configure_worker(options: LogOptions) -> None:
    """Log in a worker's process as its driver does, and drop the handlers of its framework."""
    me = f"{socket.gethostname()}:{os.getpid()}"
    configure(replace(options, worker=me), replace_handlers=True)


@contextlib.contextmanager
def in_run() -> Iterator[str]:
    """Give every line within it the id of a run and yield that id. A run in a run keeps its id.

    A run has a span. In the environment, TRACEPARENT names the span that it is a part of.
    """
    global _options
    outer = _options
    if outer.run:
        yield outer.run
        return
    run = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}"
    caller = {"traceparent": os.environ.get("TRACEPARENT", "")}
    with tracing.entry("run", caller, {"kalm.run": run}) as span:
        _options = replace(outer, run=run, trace=tracing.trace_id())
        try:
            yield run
        except BaseException as error:
            if span is not None:
                tracing.fail(span, type(error).__name__)
            raise
        finally:
            _options = outer


@contextlib.contextmanager
def in_shard(shard_id: str) -> Iterator[None]:
    """Give the lines of this thread the id of a shard.

    A thread that works for this one must run in a copy of its context:
    `pool.submit(contextvars.copy_context().run, function, …)`.
    """
    token = _shard.set(shard_id)
    try:
        yield
    finally:
        _shard.reset(token)


def _origin(record: logging.LogRecord) -> dict[str, str]:
    """Return what is known about where a line comes from."""
    shard = getattr(record, "shard", "") or _shard.get()
    trace, request = tracing.trace_id() or _options.trace, tracing.REQUEST_ID.get()
    values = zip(FIELDS, (_options.run, shard, _options.worker, trace, request), strict=True)
    return {name: value for name, value in values if value}


class JsonFormatter(logging.Formatter):
    """Writes one JSON object per line: time, level, logger, message, origin and exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without the fields that are not known."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_origin(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """Writes the usual line, with the fields of its origin at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without its traceback."""
        origin = "".join(f" {name}={value}" for name, value in _origin(record).items())
        return super().formatMessage(record) + origin
