"""Brings a complete table up to date with its corpus, encoding only what changed.

The new corpus is read and each passage compared, by id and text hash, with the row the table holds.
What is new or changed is written beside the table, encoded there by an ordinary, resumable job, and
then merged into the table by id. Readers on `live` keep the old version until all of it is done. An
interrupted sync is run again: the same changes have the same folder, so what was encoded is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace

import lance
import pyarrow as pa
import xxhash

from kalm_encoder.errors import MismatchError
from kalm_encoder.model import checkpoint
from kalm_encoder.table.checksums import text_hash
from kalm_encoder.table.location import Location
from pipeline.corpus.passages import FieldOptions, Passage
from pipeline.corpus.shards import ShardReader
from pipeline.messages import Executor
from pipeline.run.driver import Summary, run
from pipeline.run.job import EncodeJob, plan_job
from pipeline.table.claim import COMPLETE
from pipeline.table.finish import SealedTable, publish
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import SYNCS
from pipeline.upkeep.compare import Changes, Comparison

logger = logging.getLogger(__name__)

DELTA_SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])


def sync(
    job: EncodeJob,
    execute: Executor,
    *,
    delete_missing: bool = False,
    on_duplicate: str = "error",
) -> tuple[Changes, Summary | None]:
    """Make the table of `job` hold what its inputs hold.

    Args:
        job: the table's, with its settings and the new inputs.
        execute: encodes what is new or changed.
        delete_missing: remove rows whose passage is no longer in the corpus; else they stay.
        on_duplicate: which of the passages of one id counts.

    Returns:
        The changes, and what encoding them did (None where nothing needed it).

    Raises:
        InputError: the table is not complete, or bad input.
        MismatchError: the model is not the table's.
        FencedError: another process took the table over.
    """
    writer = SealedTable(Location(job.uri, job.storage_options))
    _check_model(job, writer)
    comparison = Comparison(job, plan_job(job), on_duplicate)
    changes = comparison.changes
    gone = changes.missing if delete_missing else []
    RejectStore(Location(job.uri, job.storage_options)).write_named("sync", changes.rejected)
    if changes.changed + changes.new + len(gone) == 0 and writer.state == COMPLETE:
        return changes, None
    delta = comparison.delta if changes.changed + changes.new else None
    summary = apply(job, execute, writer, delta, changes.digest, gone)
    return changes, summary


def apply(
    job: EncodeJob,
    execute: Executor,
    writer: SealedTable,
    delta: Callable[[], Iterator[Passage]] | None,
    digest: str,
    gone: list[int],
) -> Summary | None:
    """Encode passages (None: none) beside the table, merge them in by id, delete rows, publish."""
    folder = f"{job.uri.rstrip('/')}/{SYNCS}/{digest[:16]}"
    summary = None
    if delta is not None:
        source, encoded = f"{folder}/delta.lance", f"{folder}/encoded.lance"
        _write_delta(source, delta, job.storage_options)
        staging = replace(
            job, inputs=(source,), uri=encoded, fields=FieldOptions(), limit=None,
            new_generation=False, on_duplicate="error",
        )  # fmt: skip
        summary = run(staging, execute)
        RejectStore(Location(job.uri, job.storage_options)).write_named(
            f"sync-{digest[:12]}", RejectStore(Location(encoded, job.storage_options)).read()
        )
        writer.begin_change()
        staged = Location(encoded, job.storage_options).dataset()
        writer.retry(lambda: writer.upsert(staged.scanner(batch_size=1024).to_reader()))
    else:
        writer.begin_change()
    writer.retry(lambda: writer.delete(gone))
    writer.finish(compact=False)
    publish(Location(job.uri, job.storage_options))
    _drop_staged(job)
    return summary


def retry_rejects(job: EncodeJob, execute: Executor) -> Summary | None:
    """Encode the rejected rows of a complete table again, and add those that work now.

    Returns:
        What encoding did; None where no rejected row can be read as a passage.

    Raises:
        InputError: the table is not complete.
    """
    store = RejectStore(Location(job.uri, job.storage_options))
    wanted = {(reject.path, reject.line) for reject in store.read()}
    plan = plan_job(job)
    reader = ShardReader(job.storage_options)

    def delta() -> Iterator[Passage]:
        for shard in plan.shards:
            if any(path == shard.path for path, _ in wanted):
                passages, _ = reader.read(shard)
                yield from (p for p in passages if (shard.path, p.line) in wanted)

    digest = xxhash.xxh3_128()
    found = 0
    for passage in delta():
        digest.update(passage.id.encode() + b"\0" + text_hash(passage.text))
        found += 1
    if not found:
        return None
    writer = SealedTable(Location(job.uri, job.storage_options))
    _check_model(job, writer)
    summary = apply(job, execute, writer, delta, digest.hexdigest(), [])
    still = store.read_named(f"sync-{digest.hexdigest()[:12]}")
    store.keep_only({reject.id for reject in still})
    return summary


def _write_delta(
    uri: str, delta: Callable[[], Iterator[Passage]], storage_options: dict[str, str] | None
) -> None:
    """Write passages as a Lance table; its name holds their hash, so one that is there is right."""

    def batches() -> Iterator[pa.RecordBatch]:
        some: list[dict[str, str]] = []
        for passage in delta():
            some.append({"id": passage.id, "text": passage.text})
            if len(some) == 1000:
                yield pa.RecordBatch.from_pylist(some, schema=DELTA_SCHEMA)
                some = []
        if some:
            yield pa.RecordBatch.from_pylist(some, schema=DELTA_SCHEMA)

    try:
        lance.write_dataset(
            batches(), uri, schema=DELTA_SCHEMA, mode="create", storage_options=storage_options
        )
    except OSError as error:
        if "already exists" not in str(error):
            raise


def _drop_staged(job: EncodeJob) -> None:
    """Remove what this sync and earlier, abandoned ones encoded beside the table."""
    session = Location(job.uri, job.storage_options).file_session()
    staged = {path.split(".lance/")[0] for path in session.list(SYNCS) if ".lance/" in path}
    for path in sorted(staged):
        uri = f"{job.uri.rstrip('/')}/{path[path.index(SYNCS) :]}.lance"
        lance.LanceDataset.drop(uri, storage_options=job.storage_options)


def _check_model(job: EncodeJob, writer: SealedTable) -> None:
    fingerprint = checkpoint.resolve(job.model, job.revision).fingerprint
    if fingerprint != writer.spec.fingerprint:
        raise MismatchError(
            "fingerprint",
            f"{job.uri} was made by a model with fingerprint {writer.spec.fingerprint}, "
            f"{job.model} has {fingerprint}: states of two models cannot be mixed. "
            "Use the same model, or encode with --new-generation",
        )
