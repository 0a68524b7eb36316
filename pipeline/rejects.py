"""Rejected rows, as JSON lines inside the table's folder: `<table>/_kalm/rejects/<shard>.jsonl`.

Written before the shard's commit and named after it, so that encoding a shard again replaces its
file by the same one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lance.file import LanceFileSession

from pipeline.shards import Shard
from pipeline.sources import Reject

FOLDER = "_kalm/rejects"


class RejectStore:
    """The rejects of one table, on whatever store the table is."""

    def __init__(self, uri: str, storage_options: dict[str, str] | None = None) -> None:
        self.uri = f"{uri.rstrip('/')}/{FOLDER}"
        self._session = LanceFileSession(uri, storage_options=storage_options)

    def write(self, shard: Shard, rejects: Sequence[Reject]) -> None:
        """Keep the rejects of one shard; none makes no file."""
        if not rejects:
            return
        lines = [json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "rejects.jsonl")
            file.write_text("".join(lines), encoding="utf-8")
            self._session.upload_file(str(file), f"{FOLDER}/{shard.id}.jsonl")

    def read(self) -> list[Reject]:
        """Return all rejects, in the order of their shards."""
        rejects = []
        with tempfile.TemporaryDirectory() as folder:
            for name in sorted(self._session.list(FOLDER)):
                file = Path(folder, "rejects.jsonl")
                self._session.download_file(name, str(file))
                for line in file.read_text(encoding="utf-8").splitlines():
                    rejects.append(Reject(**json.loads(line)))
        return rejects
