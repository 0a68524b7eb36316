"""Joins passages of a corpus with rows of a table by the hashes of their ids, in memory.

Both sides hold all that has some ids (or is of some documents) and nothing of these is elsewhere,
so that partitions by hash can be joined one by one, anywhere and in any order. Two ids count as the
same if their 128-bit hashes are equal.

A side is a table of uint64 columns unless another type is named. A column may be absent:

- hash_high, hash_low: hash of the id, or of the id of its document where documents are split
- id_high, id_low: hash of the id; only where documents are split
- text_high, text_low: hash of the text
- metadata: checksum of the metadata; only where a table keeps some
- place: int64 place of a passage, `shard number << 40 | number in its shard`; only in a corpus
- begin: int64 place of the first passage of its document; only in a corpus that is split
- row: int64 row address, its fragment in the high 32 bits; only in a table
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from pipeline.table.partitions import HIGH, LOW
from pipeline.upkeep.comparison.corpus import Places

ID = "id_high", "id_low"
TEXT = "text_high", "text_low"
METADATA, PLACE, BEGIN, ROW = "metadata", "place", "begin", "row"
DIGESTS = 1 << 128
"""Digests are sums modulo this."""
SHOWN = 10
"""Most repeated passages that a comparison names."""
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class Joined:
    """How some passages of a corpus differ from the rows of a table.

    Attributes:
        to_encode: (n,) places of the passages that are new or have another text, ascending.
        num_new: Number of the new ones.
        to_update: (n,) places of the passages that have other metadata alone, or another number in
            their document, ascending.
        held_as: (n,) addresses of the rows that hold the texts of these.
        unchanged: Number of the other passages.
        missing: Which of the table's rows are of an id or a document that the corpus lacks.
        surplus: Which are other passages of documents that the corpus has.
        num_repeated: Number of passages that do not count, as another has their id.
        repeated: (n,) first SHOWN places of these.
        encode_digest: Sum modulo 2**128 over the hashes of what is to be encoded. It does not
            depend on any order, and the sums of several joins add up.
        update_digest: The same of what is to be updated.
    """

    to_encode: Places
    num_new: int
    to_update: Places
    held_as: NDArray[np.int64]
    unchanged: int
    missing: NDArray[np.bool_]
    surplus: NDArray[np.bool_]
    num_repeated: int
    repeated: Places
    encode_digest: int
    update_digest: int


def join(corpus: pa.Table, table: pa.Table, keep: str) -> Joined:
    """Compare passages of a corpus with rows of a table, each in any order.

    Args:
        corpus: The passages; see above.
        table: The rows; see above.
        keep: Which of the passages or documents with one id counts: "first" or "last".
    """
    is_split = BEGIN in corpus.column_names
    counts = _first_or_last(corpus, BEGIN if is_split else PLACE, keep)
    again = np.sort(corpus[PLACE].to_numpy()[~counts])
    corpus = corpus.filter(pa.array(counts)).sort_by(PLACE)
    id_columns = ID if is_split else (HIGH, LOW)
    ids, held_ids = _numbered(_words(corpus, *id_columns), _words(table, *id_columns))
    texts, held_texts = _words(corpus, *TEXT), _words(table, *TEXT)
    at = _positions(held_ids, ids)
    is_there = at >= 0
    is_same = is_there.copy()
    is_same[is_there] = (texts[is_there] == held_texts[at[is_there]]).all(axis=1)
    source = np.full(len(at), -1)
    if METADATA in corpus.column_names:
        differs = is_same.copy()
        held = table[METADATA].to_numpy()[at[is_same]]
        differs[is_same] = corpus[METADATA].to_numpy()[is_same] != held
        source[differs] = at[differs]
    lacks = missing = _positions(ids, held_ids) < 0
    if is_split:
        documents, held_documents = _numbered(_words(corpus, HIGH, LOW), _words(table, HIGH, LOW))
        # An edit moves the numbers of the passages behind it, and not their texts.
        names = HIGH, LOW, *TEXT
        in_document, held_in_document = _numbered(_words(corpus, *names), _words(table, *names))
        source[~is_same] = _positions(held_in_document, in_document)[~is_same]
        missing = _positions(documents, held_documents) < 0
    to_update = source >= 0
    to_encode = ~is_same & ~to_update
    places, held_as = corpus[PLACE].to_numpy(), table[ROW].to_numpy()[source[to_update]]
    return Joined(
        to_encode=places[to_encode],
        num_new=int((to_encode & ~is_there).sum()),
        to_update=places[to_update],
        held_as=held_as,
        unchanged=int((is_same & ~to_update).sum()),
        missing=missing,
        surplus=lacks & ~missing,
        num_repeated=len(again),
        repeated=again[:SHOWN],
        encode_digest=_digest(corpus.filter(pa.array(to_encode))),
        update_digest=_digest(corpus.filter(pa.array(to_update)).append_column(ROW, [held_as])),
    )


def _first_or_last(corpus: pa.Table, column: str, keep: str) -> NDArray[np.bool_]:
    """Return which passages count: those with the first or last value among equal hashes."""
    values, (groups,) = corpus[column].to_numpy(), _numbered(_words(corpus, HIGH, LOW))
    order = np.argsort(-values if keep == "first" else values, kind="stable")
    chosen = np.zeros(len(values), np.int64)
    chosen[groups[order]] = values[order]  # what is assigned last stays
    counts: NDArray[np.bool_] = chosen[groups] == values
    return counts


def _words(rows: pa.Table, *names: str) -> Words:
    return np.column_stack([rows[name].to_numpy() for name in names])


def _numbered(*sides: NDArray[np.generic]) -> list[NDArray[np.int64]]:
    """Return a number below the sum of all lengths for each row, the same for equal rows."""
    rows = np.concatenate(sides)
    order = np.lexsort(rows.T)
    is_next = (rows[order][1:] != rows[order][:-1]).any(axis=1)
    numbers = np.zeros(len(rows), np.int64)
    numbers[order[1:]] = is_next.cumsum()
    return np.split(numbers, np.cumsum([len(side) for side in sides])[:-1])


def _positions(numbers: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each wanted number is in `numbers`, the last time; -1 if it is not there."""
    at = np.full(len(numbers) + len(wanted), -1)
    at[numbers] = np.arange(len(numbers))
    positions: NDArray[np.int64] = at[wanted]
    return positions


def _digest(rows: pa.Table) -> int:
    names = [name for name in rows.column_names if name not in (PLACE, BEGIN)]
    facts = np.column_stack([rows[name].to_numpy().astype(np.uint64) for name in sorted(names)])
    return sum(xxhash.xxh3_128_intdigest(fact.tobytes()) for fact in facts) % DIGESTS
