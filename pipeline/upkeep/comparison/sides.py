"""The two sides of a comparison: workers write what tells passages and rows apart, by hash.

Each piece of a corpus or of a table becomes one file of partitions. Their columns are described in
join.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.ids import ids_in
from kalm_encoder.table.location import Location
from kalm_encoder.table.metadata import CHECKSUM, metadata_checksums
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import ShardRows
from pipeline.messages import Place
from pipeline.table.partitions import HIGH, LOW, hashes_of, new_name, write_partitions
from pipeline.table.rejects import write_lines
from pipeline.table.steps import DoPart, VersionWork
from pipeline.upkeep.comparison.corpus import SHARD_BITS, Piece, Reading
from pipeline.upkeep.comparison.join import BEGIN, ID, METADATA, PLACE, ROW, TEXT


def side_schema(spec: TableSpec, *, of_corpus: bool) -> pa.Schema:
    """Return the columns of a side; see join.py."""
    names = [HIGH, LOW, *(ID if spec.split else ()), *TEXT]
    names += [METADATA] if spec.metadata_columns else []
    integers = [PLACE, *([BEGIN] if spec.split else [])] if of_corpus else [ROW]
    return pa.schema(
        [(name, pa.uint64()) for name in names] + [(name, pa.int64()) for name in integers]
    )


@dataclass(frozen=True, kw_only=True)
class CorpusSide(VersionWork):
    """Pieces of a corpus, of which what tells passages apart is written.

    Attributes:
        reading: How the corpus is read.
        folder: Where the files go.
        partitions: Number of partitions.
        looks_up: Whether the rows of the table with the same ids, or of the same documents, are
            written too.
    """

    reading: Reading
    folder: Location
    partitions: int
    looks_up: bool

    def load(self, place: Place) -> DoPart:
        """Open the table, and load what splits documents. A part is a Piece.

        Its result has the names of the files, and the number of rejected rows.
        """
        read, spec, folder = self.reading.open(), self.reading.spec, self.folder
        dataset = self.dataset()

        def do(piece: Piece) -> dict[str, Any]:
            passages = [side_schema(spec, of_corpus=True).empty_table()]
            held = [side_schema(spec, of_corpus=False).empty_table()]
            rejects: list[Reject] = []
            for shard, rows in read(piece):
                passages.append(_passages(spec, rows, shard.number << SHARD_BITS))
                rejects += rows.rejects
                if self.looks_up and rows.passages:
                    held.append(_held(spec, dataset, filter=_with_same_ids(spec, rows)))
            names = {"corpus": new_name(), "table": new_name(), "rejects": new_name()}
            write_partitions(pa.concat_tables(passages), self.partitions, folder / names["corpus"])
            if self.looks_up:
                write_partitions(pa.concat_tables(held), self.partitions, folder / names["table"])
            write_lines(folder.file_session(), names["rejects"], rejects)
            return {**names, "rejected": len(rejects)}

        return do


@dataclass(frozen=True, kw_only=True)
class TableSide(VersionWork):
    """Groups of fragments of a table, of which what tells rows apart is written.

    Attributes:
        spec: Spec of the table.
        folder: Where the files go.
        partitions: Number of partitions.
    """

    spec: TableSpec
    folder: Location
    partitions: int

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is a list of fragment ids, its result the name of a file."""
        dataset = self.dataset()

        def do(fragment_ids: list[int]) -> str:
            fragments = [dataset.get_fragment(id) for id in fragment_ids]
            rows, name = _held(self.spec, dataset, fragments=fragments), new_name()
            write_partitions(rows, self.partitions, self.folder / name)
            return name

        return do


def _passages(spec: TableSpec, rows: ShardRows, first: int) -> pa.Table:
    """Return what the corpus side holds of a shard, of which the first passage has this place."""
    ids = [passage.id for passage in rows.passages]
    hashes = [text_hash(passage.text) for passage in rows.passages]
    places = np.arange(first, first + len(ids))
    columns = {**_hashes(spec, ids, rows.metadata, hashes), PLACE: places}
    if spec.metadata_columns:
        columns[METADATA] = np.array(metadata_checksums(ids, rows.metadata), np.uint64)
    if spec.split:
        lines = np.array([passage.line for passage in rows.passages])
        columns[BEGIN] = places[np.searchsorted(lines, lines)]
    return pa.table(columns, schema=side_schema(spec, of_corpus=True))


def _held(spec: TableSpec, dataset: lance.LanceDataset, **which: Any) -> pa.Table:
    """Return what the table side holds of some rows, which are chosen as in Lance's scanner."""
    names = ["id", "text_hash", *([CHECKSUM] if spec.metadata_columns else [])]
    names += ["doc_id"] if spec.split else []
    schema = side_schema(spec, of_corpus=False)
    held = [schema.empty_table()]
    # Batch by batch: as Python's objects, the ids and hashes of a fragment take a gigabyte.
    for rows in dataset.scanner(columns=names, with_row_address=True, **which).to_batches():
        ids, hashes = rows["id"].to_pylist(), rows["text_hash"].to_pylist()
        columns = {
            **_hashes(spec, ids, rows, hashes),
            ROW: rows["_rowaddr"].to_numpy().astype(np.int64),
        }
        if spec.metadata_columns:
            columns[METADATA] = rows[CHECKSUM].to_numpy()
        held.append(pa.table(columns, schema=schema))
    return pa.concat_tables(held)


def _hashes(
    spec: TableSpec,
    ids: Sequence[str],
    metadata: pa.Table | pa.RecordBatch | None,
    hashes: Sequence[bytes],
) -> dict[str, NDArray[Any]]:
    """Return the hashes of ids, documents and texts by the names of their columns."""
    of_texts = np.frombuffer(b"".join(hashes), ">u8").reshape(-1, 2).astype(np.uint64)
    columns = {**hashes_of(ids), **dict(zip(TEXT, of_texts.T, strict=True))}
    if spec.split and metadata is not None:
        columns |= zip(ID, hashes_of(ids).values(), strict=True)
        columns |= hashes_of(metadata["doc_id"].to_pylist())
    return columns


def _with_same_ids(spec: TableSpec, rows: ShardRows) -> pc.Expression:
    """Return a filter for the rows of a table that hold these passages, or their documents."""
    if spec.split and rows.metadata is not None:
        return pc.field("doc_id").isin(rows.metadata["doc_id"].unique())
    return ids_in(passage.id for passage in rows.passages)
