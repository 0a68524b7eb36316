"""Brings a complete table up to date with its corpus and encodes only what changed.

Each passage of the new corpus is compared, by id and text hash, with the row that the table holds.
Passages that are new or changed are written beside the table, encoded there by an ordinary job that
can be resumed, and then merged into the table by id. Where the metadata changed alone, the row is
merged with the states that it has. Readers of the live version see the old rows
until all of this is done. An interrupted sync is simply run again: the same changes go to the same
folder, so passages that were encoded are not encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import lance
import pyarrow as pa

from kalm_encoder.errors import MismatchError
from kalm_encoder.model import checkpoint
from kalm_encoder.table.ids import ids_in
from kalm_encoder.table.metadata import TYPES, with_checksum
from kalm_encoder.table.rows import renamed_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.erased import ErasedIds
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import Plan, ShardReader, ShardRows
from pipeline.corpus.splitting import Splitter, check_no_choice
from pipeline.messages import Executor
from pipeline.run.driver import Summary, log_readings, run
from pipeline.run.job import EncodeJob, plan_job
from pipeline.table.claim import COMPLETE
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import SealedTable, check_index_columns
from pipeline.table.fragments import write_once
from pipeline.table.publish import publish, publish_rest
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import SYNCS
from pipeline.upkeep.changes import changed_since, read_feed, source_record
from pipeline.upkeep.compare import (
    Changes,
    Corpus,
    compare,
    corpus_of,
    rows_to_encode,
    rows_to_update,
)
from pipeline.upkeep.delete import passages_and_documents, row_ids_of

NO_TITLE = "_no_title"
"""Column of nulls, of passages whose title is in their text."""


def sync(
    job: EncodeJob,
    execute: Executor,
    *,
    delete_missing: bool = False,
    on_duplicate: str = "error",
    dry_run: bool = False,
    is_feed: bool = False,
    since: int | None = None,
) -> tuple[Changes, Summary | None]:
    """Make the table of a job hold what the job's inputs hold.

    Args:
        job: The table, with its own settings, and the new inputs.
        execute: Encodes the passages that are new or changed.
        delete_missing: Delete the rows whose passage is not in the corpus any more. Without it they
            stay.
        on_duplicate: Which passage of a repeated id counts: "first", "last", or "error".
        dry_run: Only compare.
        is_feed: Whether the inputs are a feed of changes and not a corpus; see changes.py.
        since: Version of the source table that was synced last, if the input is a Lance table: then
            only what changed in it since is compared, and what was deleted there is deleted.

    Returns:
        The changes, and what encoding them did, which is None if nothing had to be encoded.

    Raises:
        InputError: If the table is not complete, or the input is bad.
        MismatchError: If the model is not the table's.
        FencedError: If another process claimed the table.
    """
    claim = None if dry_run else _claim(job)
    dataset = job.table.dataset()
    plan = _plan(job, dataset, is_feed)
    log_readings(plan)
    split = _splitter(job, dataset, on_duplicate)
    metadata = {k.decode(): v.decode() for k, v in dataset.schema.metadata.items()}
    erased, feed = erased_ids(job.table), None
    if is_feed:
        feed = read_feed(plan, metadata, job.storage_options)
    elif since is not None:
        feed = changed_since(plan, since, metadata, job.storage_options)
    if feed is None:
        corpus = corpus_of(plan, job.storage_options, on_duplicate, erased, split)
        changes = compare(dataset, corpus)
        record = source_record(plan) or {}
    else:
        corpus = partial(feed.corpus, plan, ShardReader(job.storage_options, erased), split)
        deleted = passages_and_documents(dataset, feed.deleted) if split else feed.deleted
        gone = row_ids_of(dataset, list(deleted))
        changes = compare(dataset, corpus, list(gone.values()))
        changes.rejected += feed.rejects
        record = feed.record
    if claim is None:
        return changes, None
    RejectStore(job.table).write("sync", changes.rejected)
    rows = changes.surplus + (changes.missing if delete_missing or feed else [])
    return changes, _apply(job, execute, claim, dataset, corpus, changes, rows, erased, record)


def retry_rejects(job: EncodeJob, execute: Executor) -> Summary | None:
    """Encode the rejected rows of a complete table again, and add those that work now.

    Returns:
        What encoding did, or None if no rejected row can be read as a passage that the table does
        not hold.

    Raises:
        InputError: If the table is not complete.
    """
    claim, store = _claim(job), RejectStore(job.table)
    wanted = {(reject.path, reject.line) for reject in store.read()}
    dataset = job.table.dataset()
    plan = _plan(job, dataset)
    split = _splitter(job, dataset)
    shards = [s for s in plan.shards if any(path == s.path for path, _ in wanted)]

    erased = erased_ids(job.table)

    def read() -> Iterator[tuple[str, ShardRows]]:
        reader = ShardReader(job.storage_options, erased, split)
        for shard in shards:
            rows = reader.read(shard)
            lines = [(shard.path, passage.line) for passage in rows.passages]
            yield shard.path, rows.take([i for i, line in enumerate(lines) if line in wanted])

    def corpus() -> Iterator[ShardRows]:
        return (rows for _, rows in read())

    retried = {p.id: (path, p.line) for path, rows in read() for p in rows.passages}
    if not retried:
        return None
    changes = compare(dataset, corpus)
    summary = _apply(job, execute, claim, dataset, corpus, changes, [], erased)
    failed = retried.keys() & {reject.id for reject in store.read(_rejects_name(changes))}
    store.drop(retried.keys() - failed, set(retried.values()) - {retried[id] for id in failed})
    return summary


def _claim(job: EncodeJob) -> SealedTable:
    """Open the table of a job to change it.

    Raises:
        MismatchError: If the job's model or dtype is not the table's.
        InputError: If a column to index is no metadata column.
    """
    claim = SealedTable(job.table)
    check_index_columns(job.index_columns, claim.spec)
    fingerprint = checkpoint.resolve(job.model, job.revision).fingerprint
    if fingerprint != claim.spec.fingerprint:
        raise MismatchError(
            "fingerprint",
            f"{job.uri} was made by a model with fingerprint {claim.spec.fingerprint}, "
            f"{job.model} has {fingerprint}: states of two models cannot be mixed. "
            "Use the same model, or encode with --new-generation",
        )
    computed = claim.spec.compute_dtype
    if computed and job.compute_dtype not in (None, computed):
        raise MismatchError(
            "compute_dtype",
            f"the states of {job.uri} were computed in {computed}, not in {job.compute_dtype}: "
            "leave --dtype out, or encode with --new-generation",
        )
    return claim


def _plan(job: EncodeJob, dataset: lance.LanceDataset, is_feed: bool = False) -> Plan:
    """Plan the inputs of a job; they give the metadata columns of its table.

    Raises:
        MismatchError: If the job keeps other columns.
    """
    columns = TableSpec.from_metadata(dataset.schema.metadata, job.uri).corpus_columns
    fields = replace(job.fields, keep=job.fields.keep or columns, is_feed=is_feed)
    plan = plan_job(replace(job, fields=fields))
    if plan.metadata_columns != columns:
        old, new = (
            ",".join(map(":".join, kept)) or "nothing" for kept in (columns, plan.metadata_columns)
        )
        raise MismatchError(
            "metadata_columns",
            f"{job.uri} keeps {old}, this job {new}: give the same --keep, or encode with "
            "--new-generation",
        )
    return plan


def _splitter(
    job: EncodeJob, dataset: lance.LanceDataset, on_duplicate: str = "error"
) -> Splitter | None:
    """Return what cuts the documents of a job as those of its table were cut.

    Raises:
        MismatchError: If the job cuts them in another way.
        InputError: If of two documents with one id one is to be chosen.
    """
    spec = TableSpec.from_metadata(dataset.schema.metadata, job.uri)
    if job.split not in (None, spec.split):
        raise MismatchError(
            "split",
            f"{job.uri} has split {spec.split}, this job {job.split}: give the same --split and "
            "--overlap, or encode with --new-generation",
        )
    if spec.split is None:
        return None
    check_no_choice(on_duplicate)
    return Splitter.of(spec, checkpoint.resolve(job.model, job.revision).tokenizer())


def _apply(
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
            RejectStore(job.table).write(_rejects_name(changes), RejectStore(encoded).read())
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
    claim.finish(compact=False, index_columns=job.index_columns, record=record)
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


def _rejects_name(changes: Changes) -> str:
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
        if not passages or metadata is None:
            continue
        rows = dataset.scanner(filter=ids_in(held_as)).to_table()
        places = {id: place for place, id in enumerate(rows["id"].to_pylist())}
        rows = rows.take(pa.array([places[id] for id in held_as], pa.int64()))
        ids = [passage.id for passage in passages]
        if ids != held_as:
            rows = renamed_rows(claim.spec, rows, ids, uri=claim.location.uri)
        for name, column in with_checksum(ids, metadata).items():
            rows = rows.set_column(rows.schema.get_field_index(name), rows.field(name), column)
        yield from rows.to_batches()
