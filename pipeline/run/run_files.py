"""Writes what a run tells of itself into two files beside its table, and reads them.

`_kalm/runs/<run>-<part>.jsonl` holds the records of its shards and commits. It is written twice a
minute and at the end, so a killed run loses the last half minute of them. `_kalm/live.json` is the
run view: what the run is doing now, as `kalm status --watch` reads it. A thread overwrites it every
few seconds, also while a shard or a commit takes long. After a SIGKILL its `updated_at` stands
still. A store that refuses these files costs one warning, never the run.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from kalm_encoder.errors import first_line
from kalm_encoder.table.location import Location
from pipeline.table.side_files import RUN_VIEW, RUNS, STORE_ERRORS, read_text, write_text

logger = logging.getLogger(__name__)

RECORDS_EVERY_S = 30.0
"""Seconds between two writes of the records: what a killed run loses of them at most."""
PART_RECORDS = 1000
"""Records per file. A file is written anew until it is full, so this bounds every write."""
WRITE_EVERY_S = 3.0
"""Seconds between two writes of the run view, so that who watches is not far behind."""
ENCODING, TRUNCATING, FINISHING = "encoding", "truncating", "finishing"
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
ENDED = (COMPLETE, STOPPED, FAILED)


class RunFiles:
    """The records and the view of one run, beside its table.

    Args:
        table: Where the table lies.
        run: Id of the run.
        view: Returns the run view of now, as JSON takes it.
    """

    def __init__(self, table: Location, run: str, view: Callable[[], dict[str, Any]]) -> None:
        self._session = table.file_session()
        self._run, self._view = run, view
        self._lines: list[str] = []
        self._part = self._written = 0
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write_regularly, name="run files", daemon=True)

    def start(self) -> None:
        """Begin to write regularly."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread write no more; what has not been written can be written still."""
        self._stop.set()
        if self._thread.ident:
            self._thread.join()

    def forget_earlier(self) -> None:
        """Drop the records of earlier runs: nothing of what they did is in the table."""
        try:
            for path in self._session.list(RUNS):
                self._session.delete_file(path)
        except STORE_ERRORS as error:
            logger.warning("records of earlier runs are still there: %s", first_line(error))

    def note(self, record: dict[str, Any]) -> None:
        """Keep a record, as JSON takes it, for the next write."""
        self._lines.append(json.dumps(record) + "\n")

    def write_view(self) -> None:
        """Write the run view of now."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._write(RUN_VIEW, json.dumps({**self._view(), "updated_at": now}))

    def write_records(self) -> None:
        """Write what is new; where the store refuses, keep it for the next time."""
        while len(self._lines) > self._written:
            part = self._lines[:PART_RECORDS]
            if not self._write(f"{RUNS}/{self._run}-{self._part:05d}.jsonl", "".join(part)):
                return
            self._written = len(part)
            if self._written == PART_RECORDS:
                del self._lines[:PART_RECORDS]
                self._part, self._written = self._part + 1, 0

    def _write_regularly(self) -> None:
        records_at = time.monotonic()
        while not self._stop.is_set():
            self.write_view()
            if time.monotonic() - records_at >= RECORDS_EVERY_S:
                self.write_records()
                records_at = time.monotonic()
            self._stop.wait(WRITE_EVERY_S)

    def _write(self, path: str, text: str) -> bool:
        try:
            write_text(self._session, path, text)
        except STORE_ERRORS as error:
            if not self._warned:
                logger.warning(
                    "the store refuses %s: the run goes on, `kalm status --watch` and --figure may "
                    "not show it: %s", path, first_line(error),
                )  # fmt: skip
            self._warned = True
            return False
        return True


def read_view(table: Location) -> dict[str, Any] | None:
    """Return what the last run of a table said last, or None where none ever did.

    Raises:
        OSError: The store cannot be read.
    """
    session = table.file_session()
    if not session.contains(RUN_VIEW):
        return None
    view: dict[str, Any] = json.loads(read_text(session, RUN_VIEW))
    return {"doing": ENCODING, **view}  # a view of an older state of this project does not say


def describe(view: dict[str, Any]) -> str:
    """Return a run in one line: how far it is, how fast, and how long it will still take."""
    working = view["state"] in (ENCODING, TRUNCATING)
    reason = f": {view['reason']}" if view["reason"] else ""
    ended = "" if working else f"{view['state']}{reason}, "
    ends = f", ETA {eta_text(view['eta_s'])}" if working else ""
    encoded = (
        f"{view['padding']:.1%} padding, {view['truncated']:,} truncated, "
        f"{view['rejected']:,} rejected, "
    )
    return (
        f"{ended}{view['rows_done']:,} of {view['rows']:,} passages, "
        f"{view['shards_done']:,} of {view['shards']:,} shards, "
        f"{view['tokens_per_s_now']:,.0f} tokens/s ({view['tokens_per_s']:,.0f} overall), "
        f"{encoded if view['doing'] == ENCODING else ''}commits: {view['commits']:,}, "
        f"workers: {view['num_workers']:,}{ends}"
    )


def eta_text(eta_s: dict[str, float] | None) -> str:
    """Return an ETA in words, such as `12 min (10 min to 15 min)`."""
    if eta_s is None:
        return "unknown"
    value, low, high = (_span(eta_s[key]) for key in ("value", "low", "high"))
    return value if value == low == high else f"{value} ({low} to {high})"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
