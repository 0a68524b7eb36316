"""The rejects of a table, as JSON lines in its folder: one file per shard that has any.

A shard's file is written before the shard is committed, under the shard's id, so that encoding the
shard again replaces the file by the same one.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from kalm_encoder.table.location import Location
from pipeline.corpus.passages import Reject
from pipeline.table.side_files import REJECTS, read_text, write_text


class RejectStore:
    """The rejects of one table."""

    def __init__(self, table: Location) -> None:
        self._table = table
        self._session = table.file_session()

    def write(self, name: str, rejects: Sequence[Reject]) -> None:
        """Store rejects under a name, in place of those that are there; none makes no file."""
        if rejects:
            lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects]
            write_text(self._session, f"{REJECTS}/{name}.jsonl", "".join(lines))

    def read(self, name: str | None = None) -> list[Reject]:
        """Return the rejects stored under a name, or all of them in the order of their shards."""
        paths = [path for path in self._paths() if name in (None, Path(path).stem)]
        return [reject for path in paths for reject in self._read(path)]

    def drop(self, ids: set[str], places: Collection[tuple[str, int]] = ()) -> None:
        """Drop the rejects with these ids, and those at these places, a path and a line each."""
        for path in self._paths():
            rejects = self._read(path)
            left = [r for r in rejects if r.id not in ids and (r.path, r.line) not in places]
            if not left:
                self._session.delete_file(path)
            elif left != rejects:
                self.write(Path(path).stem, left)

    def clear(self) -> None:
        """Drop all rejects."""
        for path in self._paths():
            self._session.delete_file(path)

    def too_many(self, rejects: Sequence[Reject], count: int, allowed: int, total: int) -> str:
        """Return in words that so many of `total` rows are rejected, and where they are listed."""
        last = rejects[-1]
        return (
            f"{count} rows were rejected, {allowed} of {total} may be. The last: {last.path} line "
            f"{last.line}: {last.reason}. `kalm rejects {self._table}` lists them"
        )

    def _paths(self) -> list[str]:
        return sorted(self._session.list(REJECTS))

    def _read(self, path: str) -> list[Reject]:
        lines = read_text(self._session, path).split("\n")
        return [Reject(**json.loads(line)) for line in lines if line]
