"""What a run is doing now: one small JSON file beside the table, `<table>/_kalm/live.json`.

A thread of the driver overwrites it every WRITE_EVERY_S, so it beats also while a shard or a commit
takes long. At the end it says how the run ended; after a SIGKILL its `updated_at` stands still. For
people: no job reads it, and a store that refuses it costs one warning.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from lance.file import LanceFileSession

from kalm_encoder.errors import first_line
from pipeline.table.side_files import RUN_VIEW, STORE_ERRORS, read_text, write_text

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 3.0
JOIN_S = 5.0
SILENT_AFTER_S = 15.0
"""A run that has not written for so long has died, stands still, or cannot reach the store."""
ENCODING, FINISHING = "encoding", "finishing"
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"
ENDED = (COMPLETE, STOPPED, FAILED)


class LiveFile:
    """Writes what `look` returns until it is closed."""

    def __init__(
        self,
        uri: str,
        look: Callable[[], dict[str, Any]],
        storage_options: dict[str, str] | None = None,
    ) -> None:
        self._session = LanceFileSession(uri, storage_options=storage_options)
        self._look = look
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="live", daemon=True)
        self._thread.start()

    def close(self, *, last_words: bool = True) -> None:
        """Stop; write once more unless somebody else writes there now."""
        self._stop.set()
        self._thread.join(JOIN_S)
        if last_words:
            self._write()

    def _beat(self) -> None:
        while not self._stop.is_set():
            self._write()
            self._stop.wait(WRITE_EVERY_S)

    def _write(self) -> None:
        seen = {**self._look(), "updated_at": datetime.now(UTC).isoformat(timespec="milliseconds")}
        try:
            write_text(self._session, RUN_VIEW, json.dumps(seen))
        except STORE_ERRORS as error:
            if not self._warned:
                logger.warning("`kalm status --watch` sees nothing: %s", first_line(error))
            self._warned = True


def read_live(uri: str, storage_options: dict[str, str] | None = None) -> dict[str, Any] | None:
    """Return what the last run of a table said last, or None where none ever did.

    Raises:
        OSError: the store cannot be read.
    """
    session = LanceFileSession(uri, storage_options=storage_options)
    if not session.contains(RUN_VIEW):
        return None
    seen: dict[str, Any] = json.loads(read_text(session, RUN_VIEW))
    return seen
