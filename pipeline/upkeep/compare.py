"""How a corpus differs from a complete table, by id and text hash. It writes nothing.

The corpus is read shard by shard. Row ids and positions are remembered, texts are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import lance
import numpy as np
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.reader import ids_in
from pipeline.corpus.passages import Passage, Reject
from pipeline.corpus.shards import Plan, ShardReader
from pipeline.table.duplicates import repeated

Corpus = Callable[[], Iterator[tuple[list[Passage], list[Reject]]]]
"""Reads a corpus from its start and yields the passages and rejects of each shard."""


@dataclass
class Changes:
    """How a corpus differs from a table.

    Attributes:
        unchanged: Number of passages whose text is the one that the table holds.
        changed: Number of passages whose text differs from it.
        new: Number of passages that the table does not hold.
        missing: Stable row ids of the rows whose passage is not in the corpus.
        rejected: Rows of the corpus that cannot be used.
        digest: Hash over the passages that are changed or new.
    """

    unchanged: int = 0
    changed: int = 0
    new: int = 0
    missing: list[int] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    digest: str = ""

    def counts(self) -> dict[str, int]:
        """Return the number of passages or rows of each kind."""
        return {
            "unchanged": self.unchanged,
            "changed": self.changed,
            "new": self.new,
            "missing": len(self.missing),
            "rejected": len(self.rejected),
        }


def corpus_of(plan: Plan, options: dict[str, str] | None, on_duplicate: str = "error") -> Corpus:
    """Return what reads the shards of a plan, with one passage per id.

    Args:
        plan: Shards of the corpus.
        options: Storage options of its files.
        on_duplicate: Which passage of a repeated id counts: "first", "last", or "error".

    Raises:
        InputError: If an id is repeated and `on_duplicate` is "error".
    """

    def read() -> Iterator[tuple[list[Passage], list[Reject]]]:
        reader = ShardReader(options)
        yield from map(reader.read, plan.shards)

    dropped = _repeated(read, plan.num_rows, on_duplicate)

    def read_once_per_id() -> Iterator[tuple[list[Passage], list[Reject]]]:
        start = 0
        for passages, rejects in read():
            kept = ~np.isin(np.arange(start, start + len(passages)), dropped)
            start += len(passages)
            yield [p for p, keep in zip(passages, kept, strict=True) if keep], rejects

    return read_once_per_id if len(dropped) else read


def compare(dataset: lance.LanceDataset, corpus: Corpus) -> Changes:
    """Count how a corpus differs from a table and find the rows that it lacks."""
    changes, digest = Changes(), xxhash.xxh3_128()
    found = [np.empty(0, np.int64)]
    for passages, rejects in corpus():
        stored, row_ids = _stored(dataset, passages)
        differing = _differing(passages, stored)
        new = sum(passage.id not in stored for passage in passages)
        changes.new += new
        changes.changed += len(differing) - new
        changes.unchanged += len(passages) - len(differing)
        changes.rejected += rejects
        found.append(row_ids)
        for passage in differing:
            digest.update(passage_key(passage))
    all_rows = dataset.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_numpy()
    changes.missing = np.setdiff1d(all_rows, np.concatenate(found)).tolist()
    changes.digest = digest.hexdigest()
    return changes


def differing_passages(dataset: lance.LanceDataset, corpus: Corpus) -> Iterator[Passage]:
    """Yield the passages of a corpus that a table does not hold, or holds with another text."""
    for passages, _ in corpus():
        yield from _differing(passages, _stored(dataset, passages)[0])


def passage_key(passage: Passage) -> bytes:
    """Return bytes that name a passage and its text, for a digest."""
    return passage.id.encode() + b"\0" + text_hash(passage.text)


def _stored(
    dataset: lance.LanceDataset, passages: list[Passage]
) -> tuple[dict[str, bytes], np.ndarray]:
    """Return the text hash by id, and the row ids, of those passages that a table holds."""
    rows = dataset.scanner(
        columns=["id", "text_hash"], filter=ids_in([p.id for p in passages]), with_row_id=True
    ).to_table()
    hashes = dict(zip(rows["id"].to_pylist(), rows["text_hash"].to_pylist(), strict=True))
    return hashes, rows["_rowid"].to_numpy().astype(np.int64)


def _differing(passages: list[Passage], stored: dict[str, bytes]) -> list[Passage]:
    return [p for p in passages if stored.get(p.id) != text_hash(p.text)]


def _repeated(read: Corpus, total: int, on_duplicate: str) -> np.ndarray:
    """Return the positions of the passages with a repeated id that do not count."""

    def scan() -> Iterator[tuple[list[str], np.ndarray]]:
        start = 0
        for passages, _ in read():
            yield [p.id for p in passages], np.arange(start, start + len(passages))
            start += len(passages)

    keep = "first" if on_duplicate == "error" else on_duplicate
    dropped = np.concatenate([np.empty(0, np.int64), *repeated(scan, total, keep)])
    if len(dropped) and on_duplicate == "error":
        ids = (ids[i] for ids, at in scan() for i in np.flatnonzero(np.isin(at, dropped)))
        raise InputError(
            f"{len(dropped)} passages repeat an id of another: "
            f"{', '.join(map(repr, islice(ids, 10)))}. Mend the corpus, or choose one with "
            "--on-duplicate first or last"
        )
    return dropped
