"""How a corpus differs from a complete table, by id and text hash; writes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.location import Location
from kalm_encoder.table.reader import ids_in
from pipeline.corpus.passages import Passage, Reject
from pipeline.corpus.shards import Plan, ShardReader
from pipeline.run.job import EncodeJob
from pipeline.table.duplicates import repeated


@dataclass
class Changes:
    """How a corpus differs from a table.

    Attributes:
        unchanged: passages whose text is what the table holds.
        changed: passages whose text differs.
        new: passages the table does not hold.
        missing: stable row ids of rows whose passage is no longer in the corpus.
        rejected: rows of the corpus that cannot be used.
        digest: of what is new or changed.
    """

    unchanged: int = 0
    changed: int = 0
    new: int = 0
    missing: list[int] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    digest: str = ""


class Comparison:
    """A corpus held against a table, shard by shard; remembers row ids and positions, not texts.

    Attributes:
        changes: what was found.

    Raises:
        InputError: an id is repeated in the corpus and `on_duplicate` is "error".
    """

    def __init__(self, job: EncodeJob, plan: Plan, on_duplicate: str = "error") -> None:
        self._plan = plan
        self._storage_options = job.storage_options
        self._dataset = Location(job.uri, job.storage_options).dataset()
        self._losers = self._repeated(on_duplicate)
        self.changes = Changes()
        digest = xxhash.xxh3_128()
        seen: list[np.ndarray] = [np.empty(0, np.int64)]
        for passages, rejects in self._shards():
            kinds, rows = self._classify(passages)
            seen.append(rows)
            self.changes.rejected += rejects
            for passage, kind in zip(passages, kinds, strict=True):
                setattr(self.changes, kind, getattr(self.changes, kind) + 1)
                if kind != "unchanged":
                    digest.update(passage.id.encode() + b"\0" + text_hash(passage.text))
        stored = self._dataset.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_numpy()
        self.changes.missing = np.setdiff1d(stored, np.concatenate(seen)).tolist()
        self.changes.digest = digest.hexdigest()

    def delta(self) -> Iterator[Passage]:
        """Yield the passages that are new or changed, reading the corpus again."""
        for passages, _ in self._shards():
            kinds, _ = self._classify(passages)
            yield from (p for p, k in zip(passages, kinds, strict=True) if k != "unchanged")

    def _classify(self, passages: list[Passage]) -> tuple[list[str], np.ndarray]:
        """Return the kind of each passage, and the row ids of those the table holds."""
        wanted = ids_in([p.id for p in passages])
        rows = self._dataset.scanner(
            columns=["id", "text_hash"], filter=wanted, with_row_id=True
        ).to_table()
        stored = dict(zip(rows["id"].to_pylist(), rows["text_hash"].to_pylist(), strict=True))
        kinds = []
        for passage in passages:
            old = stored.get(passage.id)
            same = old is not None and old == text_hash(passage.text)
            kinds.append("new" if old is None else "unchanged" if same else "changed")
        return kinds, rows["_rowid"].to_numpy().astype(np.int64)

    def _shards(self) -> Iterator[tuple[list[Passage], list[Reject]]]:
        """Yield the passages of each shard that count, and its rejects."""
        reader = ShardReader(self._storage_options)
        at = 0
        for shard in self._plan.shards:
            passages, rejects = reader.read(shard)
            numbers = np.arange(at, at + len(passages))
            at += len(passages)
            if len(self._losers):
                kept = ~np.isin(numbers, self._losers)
                passages = [p for p, keep in zip(passages, kept, strict=True) if keep]
            yield passages, rejects

    def _repeated(self, on_duplicate: str) -> np.ndarray:
        """Return the positions of passages whose id another passage has, and which do not count."""
        self._losers = np.empty(0, np.int64)
        first: list[str] = []

        def scan() -> Iterator[tuple[list[str], np.ndarray]]:
            at = 0
            for passages, _ in self._shards():
                yield [p.id for p in passages], np.arange(at, at + len(passages))
                at += len(passages)

        keep = "first" if on_duplicate == "error" else on_duplicate
        losers = np.sort(np.concatenate([self._losers, *repeated(scan, self._plan.num_rows, keep)]))
        if len(losers) and on_duplicate == "error":
            for ids, numbers in scan():
                first += [ids[n - numbers[0]] for n in losers if numbers[0] <= n <= numbers[-1]]
                if len(first) >= 10:
                    break
            raise InputError(
                f"{len(losers)} passages repeat an id of another: "
                f"{', '.join(map(repr, first[:10]))}. Mend the corpus, or choose one with "
                "--on-duplicate first or last"
            )
        return losers
