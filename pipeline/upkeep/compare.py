"""Compares a corpus with a complete table, by id, text hash and metadata. It writes nothing.

The corpus is read shard by shard. Row ids are remembered, texts are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.ids import ids_in
from kalm_encoder.table.metadata import CHECKSUM, metadata_checksums
from kalm_encoder.table.spec import SPLIT_COLUMNS
from pipeline.corpus.erased import NONE_ERASED, ErasedIds
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import Plan, ShardReader, ShardRows, Split
from pipeline.run.first_look import id_field_remedy
from pipeline.table.duplicates import repeated

SPLIT_NAMES = [name for name, _ in SPLIT_COLUMNS]
Corpus = Callable[[], Iterator[ShardRows]]
"""Reads a corpus from its start and yields the rows of each shard."""


@dataclass
class Changes:
    """The differences between a corpus and a table.

    Attributes:
        unchanged: Number of passages whose text and metadata are those that the table holds.
        changed: Number of passages whose text differs from it.
        metadata_changed: Number of passages with the same text and other metadata. A passage of a
            split document that has another number now counts here too.
        new: Number of passages that the table does not hold.
        missing: Stable row ids of the rows whose passage is not in the corpus.
        surplus: Stable row ids of the rows of documents in the corpus that have fewer passages now;
            they are not among the missing.
        rejected: Rows of the corpus that cannot be used.
        digest: Hash over the passages that are changed or new, and their metadata.
    """

    unchanged: int = 0
    changed: int = 0
    metadata_changed: int = 0
    new: int = 0
    missing: list[int] = field(default_factory=list)
    surplus: list[int] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    digest: str = ""

    def counts(self) -> dict[str, int]:
        """Return the number of passages or rows of each kind."""
        return {
            "unchanged": self.unchanged,
            "changed": self.changed,
            "metadata_changed": self.metadata_changed,
            "new": self.new,
            "missing": len(self.missing),
            "surplus": len(self.surplus),
            "rejected": len(self.rejected),
        }


def corpus_of(
    plan: Plan,
    options: dict[str, str] | None,
    on_duplicate: str = "error",
    erased: ErasedIds = NONE_ERASED,
    split: Split | None = None,
) -> Corpus:
    """Return what reads the shards of a plan, with one passage per id.

    Args:
        plan: Shards of the corpus.
        options: Storage options of its files.
        on_duplicate: Which passage of a repeated id counts: "first", "last", or "error".
        erased: Ids whose passages count as rejected.
        split: Cuts documents into passages; None if the rows are passages.

    Raises:
        InputError: If an id is repeated and `on_duplicate` is "error".
    """

    def read() -> Iterator[tuple[ShardRows, list[int]]]:
        """Yield the rows of each shard, with a number per passage for its place in the corpus."""
        reader = ShardReader(options, erased, split)
        for shard in plan.shards:
            rows = reader.read(shard)
            yield rows, [shard.number << 40 | passage.line for passage in rows.passages]

    def scan() -> Iterator[tuple[list[str], NDArray[np.int64]]]:
        for rows, places in read():
            yield [p.id for p in rows.passages], np.array(places, np.int64)

    keep = "first" if on_duplicate == "error" else on_duplicate
    dropped = {place for some in repeated(scan, plan.num_rows, keep) for place in some.tolist()}

    def corpus() -> Iterator[ShardRows]:
        for rows, places in read():
            yield rows.take([i for i, place in enumerate(places) if place not in dropped])

    if dropped and on_duplicate == "error":
        remedy = id_field_remedy(s.fields for s in plan.shards)
        read_again = (zip(rows.passages, places, strict=True) for rows, places in read())
        ids = (p.id for pairs in read_again for p, place in pairs if place in dropped)
        raise InputError(
            f"{len(dropped)} passages repeat an id of another: "
            f"{', '.join(map(repr, islice(ids, 10)))}. {remedy}; or mend the "
            "corpus, or choose one with --on-duplicate first or last"
        )
    return corpus


def compare(
    dataset: lance.LanceDataset, corpus: Corpus, gone: Sequence[int] | None = None
) -> Changes:
    """Count how a corpus differs from a table and find the rows that it lacks.

    Args:
        dataset: The table.
        corpus: The corpus, or what changed in it.
        gone: Stable row ids of the rows it lacks, if that is known. None looks for them.
    """
    changes, digest = Changes(), xxhash.xxh3_128()
    found = [np.empty(0, np.int64)]
    for rows in corpus():
        differ = _differences(dataset, rows)
        changes.new += differ.num_new
        changes.changed += len(differ.to_encode) - differ.num_new
        changes.metadata_changed += len(differ.to_update)
        changes.unchanged += len(rows.passages) - len(differ.to_encode) - len(differ.to_update)
        changes.rejected += rows.rejects
        found.append(differ.row_ids)
        changes.surplus += differ.surplus
        encoded = rows.take(differ.to_encode)
        for passage in encoded.passages:
            digest.update(passage.id.encode() + b"\0" + text_hash(passage.text))
        if encoded.metadata is not None:
            ids = [passage.id for passage in encoded.passages]
            digest.update(np.array(metadata_checksums(ids, encoded.metadata), np.uint64).tobytes())
    if gone is None:
        all_rows = dataset.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_numpy()
        known = np.concatenate([*found, np.array(changes.surplus, np.int64)])
        gone = np.setdiff1d(all_rows, known).tolist()
    changes.missing = list(gone)
    changes.digest = digest.hexdigest()
    return changes


def rows_to_encode(dataset: lance.LanceDataset, corpus: Corpus) -> Iterator[ShardRows]:
    """Yield, per shard, the passages that a table does not hold or holds with another text."""
    for rows in corpus():
        yield rows.take(_differences(dataset, rows).to_encode)


def rows_to_update(
    dataset: lance.LanceDataset, corpus: Corpus
) -> Iterator[tuple[ShardRows, list[str]]]:
    """Yield, per shard, the passages of which a table holds the same text and other metadata.

    Each comes with the id under which the table holds it.
    """
    for rows in corpus():
        differ = _differences(dataset, rows)
        yield rows.take(differ.to_update), differ.held_as


class _Differences(NamedTuple):
    """How the passages of a shard differ from a table.

    Attributes:
        to_encode: Places of the passages that are new or have another text.
        num_new: Number of the new ones.
        to_update: Places of the passages that have other metadata alone, or another number in
            their document.
        held_as: The id under which the table holds each of these.
        row_ids: Stable row ids of the passages that the table holds.
        surplus: Stable row ids of other passages of the same documents.
    """

    to_encode: list[int]
    num_new: int
    to_update: list[int]
    held_as: list[str]
    row_ids: NDArray[np.int64]
    surplus: list[int]


def _differences(dataset: lance.LanceDataset, rows: ShardRows) -> _Differences:
    ids, kept = [passage.id for passage in rows.passages], rows.metadata
    columns = ["id", "text_hash", *([] if kept is None else [CHECKSUM])]
    wanted, documents = ids_in(ids), [""] * len(ids)
    if is_split := kept is not None and kept.column_names[-len(SPLIT_NAMES) :] == SPLIT_NAMES:
        documents = kept["doc_id"].to_pylist()
        wanted = pc.field("doc_id").isin(pa.array(list(set(documents)), pa.string()))
        columns.append("doc_id")
    table = dataset.scanner(columns=columns, filter=wanted, with_row_id=True).to_table()
    stored = table["id"].to_pylist()
    places = {id: place for place, id in enumerate(stored)}
    held = dict(zip(stored, table["text_hash"].to_pylist(), strict=True))
    hashes = [text_hash(passage.text) for passage in rows.passages]
    same = [held.get(id) == hash for id, hash in zip(ids, hashes, strict=True)]
    sources: dict[int, str] = {}
    if kept is not None:
        sums, made = table[CHECKSUM].to_pylist(), metadata_checksums(ids, kept)
        sources = {i: id for i, id in enumerate(ids) if same[i] and sums[places[id]] != made[i]}
    if is_split:  # An edit moves the numbers of the passages behind it, and not their texts.
        texts = zip(table["doc_id"].to_pylist(), held.values(), strict=True)
        by_text = dict(zip(texts, stored, strict=True))
        moved = {i: by_text.get((documents[i], hashes[i])) for i, ok in enumerate(same) if not ok}
        sources |= {i: id for i, id in moved.items() if id is not None}
    row_ids = table["_rowid"].to_numpy().astype(np.int64)
    among = set(ids)
    is_wanted = np.array([id in among for id in stored], bool)
    to_encode = [i for i, is_same in enumerate(same) if not is_same and i not in sources]
    return _Differences(
        to_encode,
        sum(ids[i] not in places for i in to_encode),
        sorted(sources),
        [sources[i] for i in sorted(sources)],
        row_ids[is_wanted],
        row_ids[~is_wanted].tolist(),
    )
