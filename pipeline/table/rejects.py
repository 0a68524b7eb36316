"""The rejects of a table, as JSON lines in its folder: one file per shard that has any.

A shard's file is written before the shard is committed, under the shard's id, so that encoding the
shard again replaces the file by the same one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from lance.file import LanceFileSession

from kalm_encoder.table.location import Location
from pipeline.corpus.passages import Reject
from pipeline.table.side_files import REJECTS, read_text


class RejectStore:
    """The rejects of one table."""

    def __init__(self, table: Location) -> None:
        self._table = table
        self._session = table.file_session()

    def write(self, name: str, rejects: Iterable[Reject]) -> None:
        """Store rejects under a name, in place of those that are there; none makes no file."""
        write_lines(self._session, f"{REJECTS}/{name}.jsonl", rejects)

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
        return read_lines(self._session, path)


def write_lines(session: LanceFileSession, path: str, rejects: Iterable[Reject]) -> None:
    """Write rejects into a file, one by one; none makes no file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rejects")
        with file.open("w", encoding="utf-8") as stream:
            for reject in rejects:
                stream.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
        if file.stat().st_size:
            session.upload_file(str(file), path)


def read_lines(session: LanceFileSession, path: str) -> list[Reject]:
    """Return the rejects of a file that `write_lines` wrote."""
    lines = read_text(session, path).split("\n")
    return [Reject(**json.loads(line)) for line in lines if line]
