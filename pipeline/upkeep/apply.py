"""Carries out what a comparison found: the second half of a sync.

Passages that are new or changed are written beside the table and encoded there by an ordinary job.
Then they are merged in by id, together with the rows of which the metadata or the id changed alone;
other rows are deleted, and the table is published.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lance
import pyarrow as pa

from kalm_encoder.table.ids import ids_in
from kalm_encoder.table.metadata import TYPES, with_checksum
from kalm_encoder.table.rows import renamed_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.erased import ErasedIds
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardRows
from pipeline.messages import Executor
from pipeline.run.driver import Summary, run
from pipeline.run.job import EncodeJob
from pipeline.table.claim import COMPLETE
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_once
from pipeline.table.publish import publish, publish_rest
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import SYNCS
from pipeline.table.steps import Steps
from pipeline.upkeep.compare import Changes, Corpus, rows_to_encode, rows_to_update

NO_TITLE = "_no_title"
"""Column of nulls, of passages whose title is in their text."""
UPDATED_AT_ONCE = 256
"""Rows whose metadata change that are in memory at the same time, with their states."""


def apply_changes(
    job: EncodeJob,
    execute: Executor,
    claim: SealedTable,
    dataset: lance.LanceDataset,
    corpus: Corpus,
    changes: Changes,
    gone: list[int],
    erased: ErasedIds,
    record: dict[str, str] | None = None,
) -> Summary | None:
    """Encode passages beside the table, merge rows in by id, delete rows, and publish.

    Args:
        job: The table and its settings.
        execute: Encodes the passages.
        claim: The table, at the version that the changes were chosen by.
        dataset: The same version.
        corpus: What the table is to hold.
        changes: What differs. Its digest names the folder in which the passages are encoded.
        gone: Stable row ids to delete.
        erased: Ids that were erased when the corpus was read.
        record: Schema metadata by which the table remembers what was applied.
    """
    record = record or {}
    differ = changes.changed + changes.new > 0
    is_done = not (differ or changes.metadata_changed or gone)
    is_done = is_done and claim.metadata.items() >= record.items()
    if is_done and claim.state == COMPLETE and not claim.without_index(job.index_columns):
        publish_rest(job.table)
        return None
    folder = job.table / f"{SYNCS}/{changes.digest[:16]}"
    source, encoded = folder / "delta.lance", folder / "encoded.lance"
    summary = None
    with _removed_if_erased(job, erased):
        if differ:
            # The name holds a hash of the passages, so a delta that exists is complete.
            schema = _delta_schema(claim.spec)
            write_once(_delta_rows(rows_to_encode(dataset, corpus), schema), source, schema)
            staging = replace(
                job, inputs=(source.uri,), uri=encoded.uri, fields=_delta_fields(claim.spec),
                limit=None, new_generation=False, on_duplicate="error", index_columns=(),
                split=None,
            )  # fmt: skip
            computed = claim.spec.compute_dtype or job.compute_dtype
            spec = replace(claim.spec, compute_dtype=computed, split=None)  # they are split by now
            summary = run(staging, execute, like=spec)
            RejectStore(job.table).write(rejects_name(changes), RejectStore(encoded).read())
        claim.begin_change()

    def merged() -> Iterator[pa.RecordBatch]:
        if differ:
            yield from encoded.dataset().scanner(batch_size=1024).to_batches()
        if changes.metadata_changed:
            yield from _updated_rows(claim, dataset, rows_to_update(dataset, corpus))

    if differ or changes.metadata_changed:
        schema = dataset.schema
        claim.retry(lambda: claim.upsert(pa.RecordBatchReader.from_batches(schema, merged())))
    claim.retry(lambda: claim.delete(gone))
    claim.finish(Steps(execute), compact=False, index_columns=job.index_columns, record=record)
    publish(job.table)
    _remove_staged(job)
    return summary


@contextmanager
def _removed_if_erased(job: EncodeJob, erased: ErasedIds) -> Iterator[None]:
    """Remove what is staged if that fails and more ids than these have been erased meanwhile.

    The erasure could not remove what was staged after it.
    """
    try:
        yield
    except BaseException:
        if erased_ids(job.table) != erased:
            _remove_staged(job)
        raise


def _remove_staged(job: EncodeJob) -> None:
    """Remove what syncs have staged, abandoned ones too.

    The manifests go first, so that a delta of which only a part is removed is not taken for a
    table.
    """
    session = job.table.file_session()
    for path in sorted(session.list(SYNCS), key=lambda path: "/_versions/" not in path):
        session.delete_file(path)


def rejects_name(changes: Changes) -> str:
    """Return the name under which the rejects of a sync are stored."""
    return f"sync-{changes.digest[:12]}"


def _delta_schema(spec: TableSpec) -> pa.Schema:
    """Return the schema of the passages to encode: id, text and metadata."""
    fields = [pa.field("id", pa.string()), pa.field("text", pa.string())]
    if spec.metadata_columns:  # the text has its title already; `title` may be a metadata column
        fields.append(pa.field(NO_TITLE, pa.string()))
    return pa.schema(fields + [pa.field(name, TYPES[type]) for name, type in spec.metadata_columns])


def _delta_fields(spec: TableSpec) -> FieldOptions:
    title = NO_TITLE if spec.metadata_columns else None
    return FieldOptions("id", "text", title, keep=spec.metadata_columns)


def _delta_rows(delta: Iterable[ShardRows], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    for passages, _, metadata in delta:
        columns: dict[str, Any] = {
            "id": [p.id for p in passages],
            "text": [p.text for p in passages],
            NO_TITLE: pa.nulls(len(passages), pa.string()),
        }
        if metadata is not None:
            columns |= zip(metadata.column_names, metadata.columns, strict=True)
        yield from pa.table({name: columns[name] for name in schema.names}, schema).to_batches()


def _updated_rows(
    claim: SealedTable,
    dataset: lance.LanceDataset,
    updates: Iterable[tuple[ShardRows, list[str]]],
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of passages as the table holds them, with new metadata and perhaps new ids."""
    for (passages, _, metadata), held_as in updates:
        if metadata is None:
            continue
        for start in range(0, len(held_as), UPDATED_AT_ONCE):
            some = slice(start, start + UPDATED_AT_ONCE)
            held, ids = held_as[some], [passage.id for passage in passages[some]]
            rows = dataset.scanner(filter=ids_in(held)).to_table()
            places = {id: place for place, id in enumerate(rows["id"].to_pylist())}
            rows = rows.take(pa.array([places[id] for id in held], pa.int64()))
            if ids != held:
                rows = renamed_rows(claim.spec, rows, ids, uri=claim.location.uri)
            for name, column in with_checksum(ids, metadata.slice(start, len(ids))).items():
                rows = rows.set_column(rows.schema.get_field_index(name), rows.field(name), column)
            yield from rows.to_batches()
