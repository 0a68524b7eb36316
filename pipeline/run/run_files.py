"""Writes what a run tells of itself into two files beside its table, from a thread of its own.

`_kalm/runs/<run>-<part>.jsonl` holds the records of its shards and commits. It is written twice a
minute and at the end, so a killed run loses the last half minute of them. `_kalm/live.json` is the
run view: what the run is doing now, overwritten every few seconds, also while a shard or a commit
takes long. After a SIGKILL its `updated_at` stands still. A store that refuses these files costs
one warning, never the run.
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
from pipeline.run.records import COMMIT, CommitRecord, ShardRecord
from pipeline.run.run_view import WRITE_EVERY_S
from pipeline.table.side_files import RUN_VIEW, RUNS, STORE_ERRORS, write_text

logger = logging.getLogger(__name__)

RECORDS_EVERY_S = 30.0
"""Seconds between two writes of the records: what a killed run loses of them at most."""
PART_RECORDS = 1000
"""Records per file. A file is written anew until it is full, so this bounds every write."""


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

    def note(self, record: ShardRecord | CommitRecord) -> None:
        """Keep a record for the next write."""
        kind = {"kind": COMMIT} if isinstance(record, CommitRecord) else {}
        self._lines.append(json.dumps({**kind, **vars(record)}) + "\n")

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
                    "miss it: %s", path, first_line(error),
                )  # fmt: skip
            self._warned = True
            return False
        return True
