"""Writes what a sync stages: passages to encode, and rows whose metadata or ids changed alone.

Each piece of the corpus with such passages becomes a fragment, written by a worker, and one commit
makes a dataset of all of them. So a dataset that exists is complete.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.dataset import LanceOperation
from lance.fragment import FragmentMetadata, write_fragments
from numpy.typing import NDArray

from kalm_encoder.table.location import Location
from kalm_encoder.table.metadata import TYPES, with_checksum
from kalm_encoder.table.rows import renamed_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardRows
from pipeline.messages import Place
from pipeline.table.duplicates import rows_at
from pipeline.table.fragments import check_written
from pipeline.table.partitions import read_partition
from pipeline.table.steps import DoPart, Steps, VersionWork
from pipeline.upkeep.comparison.corpus import SHARD_BITS, Corpus, Piece, Reading
from pipeline.upkeep.comparison.differences import ENCODE, Groups
from pipeline.upkeep.comparison.join import PLACE, ROW

NO_TITLE = "_no_title"
"""Column of nulls, of passages whose title is in their text."""
UPDATED_AT_ONCE = 256
"""Rows whose metadata change that are in memory at the same time, with their states."""
Batches = Iterator[pa.RecordBatch]


def delta_schema(spec: TableSpec) -> pa.Schema:
    """Return the schema of the passages to encode: id, text and metadata."""
    fields = [pa.field("id", pa.string()), pa.field("text", pa.string())]
    if spec.metadata_columns:  # the text has its title already; `title` may be a metadata column
        fields.append(pa.field(NO_TITLE, pa.string()))
    return pa.schema(fields + [pa.field(name, TYPES[type]) for name, type in spec.metadata_columns])


def delta_fields(spec: TableSpec) -> FieldOptions:
    """Return how the passages to encode are read."""
    title = NO_TITLE if spec.metadata_columns else None
    return FieldOptions("id", "text", title, keep=spec.metadata_columns)


@dataclass(frozen=True, kw_only=True)
class StagingWork(VersionWork):
    """Pieces of a corpus of which some passages are staged. The result of a part is its fragments.

    Attributes:
        reading: How the corpus is read.
        files: Files in which the comparison says which passages, by piece.
        target: Where the passages are staged.
    """

    reading: Reading
    files: tuple[Location, ...]
    target: Location

    @abstractmethod
    def schema(self, dataset: lance.LanceDataset) -> pa.Schema:
        """Return the schema of what is staged."""

    @abstractmethod
    def chosen(self, sources: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which changes are staged, from what they are held as."""

    @abstractmethod
    def batches(
        self, dataset: lance.LanceDataset, rows: ShardRows, sources: NDArray[np.int64]
    ) -> Batches:
        """Make batches of passages, and of the addresses of what they are held as."""

    def load(self, place: Place) -> DoPart:
        """Open the table, and load what splits documents."""
        read, dataset = self.reading.open(), self.dataset()
        schema = self.schema(dataset)

        def batches(piece: Piece) -> Batches:
            changes = pa.concat_tables(read_partition(self.files, piece.number)).sort_by(PLACE)
            sources = changes[ROW].to_numpy()
            is_chosen = self.chosen(sources)
            places, sources = changes[PLACE].to_numpy()[is_chosen], sources[is_chosen]
            numbers = places >> SHARD_BITS
            for shard, rows in read(piece, set(numbers.tolist())):
                of_shard = numbers == shard.number
                some = (places[of_shard] & ((1 << SHARD_BITS) - 1)).tolist()
                yield from self.batches(dataset, rows.take(some), sources[of_shard])

        def do(piece: Piece) -> list[str]:
            reader = pa.RecordBatchReader.from_batches(schema, batches(piece))
            fragments = write_fragments(
                reader, self.target.uri, schema, mode="create", data_storage_version="2.2",
                enable_stable_row_ids=True, storage_options=self.target.options,
            )  # fmt: skip
            return [json.dumps(fragment.to_json()) for fragment in fragments]

        return do


class DeltaWork(StagingWork):
    """Passages to encode."""

    def schema(self, dataset: lance.LanceDataset) -> pa.Schema:
        """Return the schema of the passages."""
        return delta_schema(self.reading.spec)

    def chosen(self, sources: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which changes are passages to encode."""
        is_chosen: NDArray[np.bool_] = sources == ENCODE
        return is_chosen

    def batches(
        self, dataset: lance.LanceDataset, rows: ShardRows, sources: NDArray[np.int64]
    ) -> Batches:
        """Make batches of ids, texts and metadata."""
        passages, _, metadata = rows
        columns: dict[str, Any] = {
            "id": [passage.id for passage in passages],
            "text": [passage.text for passage in passages],
            NO_TITLE: pa.nulls(len(passages), pa.string()),
        }
        if metadata is not None:
            columns |= zip(metadata.column_names, metadata.columns, strict=True)
        schema = self.schema(dataset)
        yield from pa.table({name: columns[name] for name in schema.names}, schema).to_batches()


class UpdatesWork(StagingWork):
    """Rows of the table with other metadata, and perhaps other ids."""

    def schema(self, dataset: lance.LanceDataset) -> pa.Schema:
        """Return the schema of the table."""
        return dataset.schema.remove_metadata()

    def chosen(self, sources: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which changes keep their states."""
        is_chosen: NDArray[np.bool_] = sources != ENCODE
        return is_chosen

    def batches(
        self, dataset: lance.LanceDataset, rows: ShardRows, sources: NDArray[np.int64]
    ) -> Batches:
        """Make batches of the rows as the table holds them, with the new metadata and ids."""
        spec, schema = self.reading.spec, self.schema(dataset)
        if rows.metadata is None:
            return
        for start in range(0, len(sources), UPDATED_AT_ONCE):
            some = slice(start, start + UPDATED_AT_ONCE)
            ids = [passage.id for passage in rows.passages[some]]
            held = rows_at(dataset, sources[some].tolist(), schema.names)
            if held["id"].to_pylist() != ids:
                held = renamed_rows(spec, held, ids, uri=self.table.uri)
            metadata = rows.metadata.slice(start, len(ids))
            for name, column in with_checksum(ids, metadata).items():
                held = held.set_column(held.schema.get_field_index(name), held.field(name), column)
            yield from held.cast(schema).to_batches()


def stage(
    steps: Steps,
    kind: type[StagingWork],
    table: Location,
    dataset: lance.LanceDataset,
    corpus: Corpus,
    chosen: Groups,
    folder: str,
    target: Location,
) -> None:
    """Write what was found in a corpus as a dataset of its own, in the order of the corpus.

    Args:
        steps: How the steps are done.
        kind: What is written.
        table: Address of the table.
        dataset: The version that was compared.
        corpus: The corpus.
        chosen: Which passages are written, by piece of the corpus.
        folder: Name of the folder of the comparison that chose them.
        target: Where the dataset is to be. One that exists stays, since its folder's name stands
            for the changes.

    Raises:
        IncompleteError: If a part of the corpus cannot be read.
        KalmError: If a file that a worker wrote is not there any more.
        OSError: If the store refuses.
    """
    if _exists(target):
        return
    work = kind(
        table=table, reading=corpus.reading, files=tuple(chosen.files), version=dataset.version,
        target=target,
    )  # fmt: skip
    parts = [part for part in corpus.parts() if chosen.counts[part.number]]
    name = f"writing {target.uri.rsplit('/', 1)[-1]}"
    # Its name stands for the pieces, too: other files may have the same changes elsewhere.
    record = target / folder if len(parts) > 1 else None
    written = steps.results(name, work, parts, record)
    fragments = [fragment for made in written for fragment in made]
    check_written(fragments, target)
    metadata = [FragmentMetadata.from_json(fragment) for fragment in fragments]
    schema = work.schema(dataset)
    try:
        lance.LanceDataset.commit(
            target.uri, LanceOperation.Overwrite(schema, metadata), enable_stable_row_ids=True,
            storage_options=target.options, max_retries=0,
        )  # fmt: skip
    except OSError:
        if not _exists(target):  # another process may do the same
            raise


def _exists(target: Location) -> bool:
    return bool(target.file_session().list("_versions"))
