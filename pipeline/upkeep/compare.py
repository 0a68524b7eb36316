"""Compares a corpus with a complete table, by id and text hash. It writes nothing.

The corpus is read shard by shard. Row ids are remembered, texts are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import lance
import numpy as np
import xxhash
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.ids import ids_in
from pipeline.corpus.erased import NONE_ERASED, ErasedIds
from pipeline.corpus.passages import Passage, Reject
from pipeline.corpus.shards import Plan, ShardReader
from pipeline.run.first_look import id_field_remedy
from pipeline.table.duplicates import repeated

Corpus = Callable[[], Iterator[tuple[list[Passage], list[Reject]]]]
"""Reads a corpus from its start and yields the passages and rejects of each shard."""


@dataclass
class Changes:
    """The differences between a corpus and a table.

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


def corpus_of(
    plan: Plan,
    options: dict[str, str] | None,
    on_duplicate: str = "error",
    erased: ErasedIds = NONE_ERASED,
) -> Corpus:
    """Return what reads the shards of a plan, with one passage per id.

    Args:
        plan: Shards of the corpus.
        options: Storage options of its files.
        on_duplicate: Which passage of a repeated id counts: "first", "last", or "error".
        erased: Ids whose passages count as rejected.

    Raises:
        InputError: If an id is repeated and `on_duplicate` is "error".
    """

    def read() -> Iterator[tuple[list[tuple[int, Passage]], list[Reject]]]:
        """Yield the passages of each shard with a number that says where in the corpus they are."""
        reader = ShardReader(options, erased)
        for shard in plan.shards:
            passages, rejects = reader.read(shard)
            yield [(shard.number << 40 | p.line, p) for p in passages], rejects

    def scan() -> Iterator[tuple[list[str], NDArray[np.int64]]]:
        for placed, _ in read():
            yield [p.id for _, p in placed], np.array([place for place, _ in placed], np.int64)

    keep = "first" if on_duplicate == "error" else on_duplicate
    dropped = {place for some in repeated(scan, plan.num_rows, keep) for place in some.tolist()}

    def corpus() -> Iterator[tuple[list[Passage], list[Reject]]]:
        for placed, rejects in read():
            yield [p for place, p in placed if place not in dropped], rejects

    if dropped and on_duplicate == "error":
        remedy = id_field_remedy(s.fields for s in plan.shards)
        ids = (p.id for placed, _ in read() for place, p in placed if place in dropped)
        raise InputError(
            f"{len(dropped)} passages repeat an id of another: "
            f"{', '.join(map(repr, islice(ids, 10)))}. {remedy}; or mend the "
            "corpus, or choose one with --on-duplicate first or last"
        )
    return corpus


def compare(dataset: lance.LanceDataset, corpus: Corpus) -> Changes:
    """Count how a corpus differs from a table and find the rows that it lacks."""
    changes, digest = Changes(), xxhash.xxh3_128()
    found = [np.empty(0, np.int64)]
    for passages, rejects in corpus():
        differing, num_new, row_ids = _compare_some(dataset, passages)
        changes.new += num_new
        changes.changed += len(differing) - num_new
        changes.unchanged += len(passages) - len(differing)
        changes.rejected += rejects
        found.append(row_ids)
        for passage in differing:
            digest.update(passage.id.encode() + b"\0" + text_hash(passage.text))
    all_rows = dataset.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_numpy()
    changes.missing = np.setdiff1d(all_rows, np.concatenate(found)).tolist()
    changes.digest = digest.hexdigest()
    return changes


def differing_passages(dataset: lance.LanceDataset, corpus: Corpus) -> Iterator[list[Passage]]:
    """Yield, per shard, the passages that a table does not hold or holds with another text."""
    for passages, _ in corpus():
        yield _compare_some(dataset, passages)[0]


def _compare_some(
    dataset: lance.LanceDataset, passages: list[Passage]
) -> tuple[list[Passage], int, NDArray[np.int64]]:
    """Return the passages that differ, how many of them are new, and the row ids of the others."""
    wanted = ids_in([p.id for p in passages])
    scanner = dataset.scanner(columns=["id", "text_hash"], filter=wanted, with_row_id=True)
    rows = scanner.to_table()
    stored = dict(zip(rows["id"].to_pylist(), rows["text_hash"].to_pylist(), strict=True))
    differing = [p for p in passages if stored.get(p.id) != text_hash(p.text)]
    num_new = sum(p.id not in stored for p in passages)
    return differing, num_new, rows["_rowid"].to_numpy().astype(np.int64)
