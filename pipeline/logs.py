"""How log lines look, and what each says of where it comes from: run, shard, worker.

Text or JSON lines on stderr, in the command and in its workers alike. A process works for one run
at a time, so run and worker belong to the process; the shard belongs to the thread that works on
it (a contextvar), or to a line of its own: `logger.warning(…, extra={"shard": shard.id})`.
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

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)
NOISY = ("httpx", "httpx2", "ray", "transformers", "filelock", "huggingface_hub")
FIELDS = ("run", "shard", "worker")


@dataclass(frozen=True)
class LogOptions:
    """How a process logs; travels to the workers.

    Attributes:
        format: "text" or "json".
        level: least level that is shown.
        run: id of the run, "" outside of one.
        worker: host and process of a worker, "" in the command itself.
    """

    format: str = TEXT
    level: int = logging.INFO
    run: str = ""
    worker: str = ""


_options = LogOptions()
_shard: ContextVar[str] = ContextVar("shard", default="")


def current() -> LogOptions:
    """Return how this process logs, for a worker to do the same."""
    return _options


def configure(options: LogOptions, *, replace_handlers: bool = False) -> None:
    """Log to stderr as the options say.

    Args:
        options: from the command line, or what `current` returned in the driver.
        replace_handlers: of somebody else; otherwise they stay and nothing is added.
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
        # Read when those libraries are imported: they write to stderr past the logging.
        os.environ.setdefault("RAY_DEDUP_LOGS", "0")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def configure_worker(options: LogOptions) -> None:
    """Log in a worker's process as its driver does; what its framework set up goes."""
    me = f"{socket.gethostname()}:{os.getpid()}"
    configure(replace(options, worker=me), replace_handlers=True)


@contextlib.contextmanager
def in_run() -> Iterator[str]:
    """Give every line within it the id of a run, a new one unless there is one; yields the id."""
    global _options
    outer = _options
    run = outer.run or f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}"
    _options = replace(outer, run=run)
    try:
        yield run
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
    """Return what is known of where a line comes from."""
    shard = getattr(record, "shard", "") or _shard.get()
    values = zip(FIELDS, (_options.run, shard, _options.worker), strict=True)
    return {name: value for name, value in values if value}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and run, shard, worker, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; fields that are not known are left out."""
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
    """The usual line, with the same fields at its end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without its traceback."""
        origin = "".join(f" {name}={value}" for name, value in _origin(record).items())
        return super().formatMessage(record) + origin
