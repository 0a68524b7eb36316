"""Rejected rows, as JSON lines inside the table's folder: `<table>/_kalm/rejects/<shard>.jsonl`.

Written before the shard's commit and named after it, so that encoding a shard again replaces its
file by the same one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kalm_encoder.table.location import Location
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import Shard
from pipeline.table.side_files import REJECTS, read_text, write_text


class RejectStore:
    """The rejects of one table, on whatever store the table is."""

    def __init__(self, table: Location) -> None:
        self.location = table / REJECTS
        self._session = table.file_session()

    def write(self, shard: Shard, rejects: Sequence[Reject]) -> None:
        """Keep the rejects of one shard; none makes no file."""
        self.write_named(shard.id, rejects)

    def write_named(self, name: str, rejects: Sequence[Reject]) -> None:
        """Keep rejects under a name, in place of what is there; none makes no file."""
        if not rejects:
            return
        lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects]
        write_text(self._session, f"{REJECTS}/{name}.jsonl", "".join(lines))

    def read(self) -> list[Reject]:
        """Return all rejects, in the order of their shards."""
        return [reject for path in self._paths() for reject in self._read(path)]

    def read_named(self, name: str) -> list[Reject]:
        """Return the rejects kept under a name."""
        paths = [p for p in self._paths() if p.endswith(f"/{name}.jsonl")]
        return [reject for path in paths for reject in self._read(path)]

    def keep_only(self, ids: set[str | None]) -> None:
        """Drop the rejects that have an id and are not among `ids`: they are in the table now."""
        for path in self._paths():
            rejects = self._read(path)
            left = [r for r in rejects if r.id is None or r.id in ids]
            if not left:
                self._session.delete_file(path)
            elif left != rejects:
                self.write_named(Path(path).stem, left)

    def clear(self) -> None:
        """Drop all rejects."""
        for path in self._paths():
            self._session.delete_file(path)

    def _paths(self) -> list[str]:
        return sorted(self._session.list(REJECTS))

    def _read(self, path: str) -> list[Reject]:
        lines = read_text(self._session, path).split("\n")
        return [Reject(**json.loads(line)) for line in lines if line]
