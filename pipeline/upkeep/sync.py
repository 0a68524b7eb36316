"""Brings a complete table up to date with its corpus and encodes only what changed.

Each passage of the new corpus is compared, by id and text hash, with the row that the table holds.
Passages that are new or changed are written beside the table, encoded there by an ordinary job that
can be resumed, and then merged into the table by id. Readers of the live version see the old rows
until all of this is done. An interrupted sync is simply run again: the same changes go to the same
folder, so passages that were encoded are not encoded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pyarrow as pa

from kalm_encoder.errors import MismatchError
from kalm_encoder.model import checkpoint
from pipeline.corpus.passages import FieldOptions, Passage, Reject
from pipeline.corpus.shards import ShardReader
from pipeline.messages import Executor
from pipeline.run.driver import Summary, log_readings, run
from pipeline.run.job import EncodeJob, plan_job
from pipeline.table.claim import COMPLETE
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_once
from pipeline.table.publish import publish
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import SYNCS
from pipeline.upkeep.compare import Changes, compare, corpus_of, differing_passages

DELTA_SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])


def sync(
    job: EncodeJob,
    execute: Executor,
    *,
    delete_missing: bool = False,
    on_duplicate: str = "error",
    dry_run: bool = False,
) -> tuple[Changes, Summary | None]:
    """Make the table of a job hold what the job's inputs hold.

    Args:
        job: The table, with its own settings, and the new inputs.
        execute: Encodes the passages that are new or changed.
        delete_missing: Delete the rows whose passage is not in the corpus any more. Without it they
            stay.
        on_duplicate: Which passage of a repeated id counts: "first", "last", or "error".
        dry_run: Only compare.

    Returns:
        The changes, and what encoding them did, which is None if nothing had to be encoded.

    Raises:
        InputError: If the table is not complete, or the input is bad.
        MismatchError: If the model is not the table's.
        FencedError: If another process claimed the table.
    """
    claim = None if dry_run else _claim(job)
    plan = plan_job(job)
    log_readings(plan)
    corpus = corpus_of(plan, job.storage_options, on_duplicate, erased_ids(job.table))
    dataset = job.table.dataset()
    changes = compare(dataset, corpus)
    if claim is None:
        return changes, None
    RejectStore(job.table).write("sync", changes.rejected)
    delta = differing_passages(dataset, corpus)
    gone = changes.missing if delete_missing else []
    return changes, _apply(job, execute, claim, changes, delta, gone)


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
    shards = [s for s in plan_job(job).shards if any(path == s.path for path, _ in wanted)]

    def corpus() -> Iterator[tuple[list[Passage], list[Reject]]]:
        reader = ShardReader(job.storage_options, erased_ids(job.table))
        for shard in shards:
            passages, _ = reader.read(shard)
            yield [p for p in passages if (shard.path, p.line) in wanted], []

    retried = {passage.id for passages, _ in corpus() for passage in passages}
    if not retried:
        return None
    dataset = job.table.dataset()
    changes = compare(dataset, corpus)
    summary = _apply(job, execute, claim, changes, differing_passages(dataset, corpus), [])
    store.drop(retried - {reject.id for reject in store.read(_rejects_name(changes))})
    return summary


def _claim(job: EncodeJob) -> SealedTable:
    """Open the table of a job to change it.

    Raises:
        MismatchError: If the job's model or dtype is not the table's.
    """
    claim = SealedTable(job.table)
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


def _apply(
    job: EncodeJob,
    execute: Executor,
    claim: SealedTable,
    changes: Changes,
    delta: Iterable[list[Passage]],
    gone: list[int],
) -> Summary | None:
    """Encode passages beside the table, merge them in by id, delete rows, and publish.

    Args:
        job: The table and its settings.
        execute: Encodes the passages.
        claim: The table, at the version that the changes were chosen by.
        changes: What differs. Its digest names the folder in which the passages are encoded.
        delta: The passages that are changed or new.
        gone: Stable row ids to delete.
    """
    differ = changes.changed + changes.new > 0
    if not differ and not gone and claim.state == COMPLETE:
        return None
    folder = job.table / f"{SYNCS}/{changes.digest[:16]}"
    source, encoded = folder / "delta.lance", folder / "encoded.lance"
    summary = None
    if differ:
        # The name holds a hash of the passages, so a delta that exists is complete.
        write_once(_delta_rows(delta), source, DELTA_SCHEMA)
        staging = replace(
            job, inputs=(source.uri,), uri=encoded.uri, fields=FieldOptions(), limit=None,
            new_generation=False, on_duplicate="error",
        )  # fmt: skip
        computed = claim.spec.compute_dtype or job.compute_dtype
        summary = run(staging, execute, like=replace(claim.spec, compute_dtype=computed))
        RejectStore(job.table).write(_rejects_name(changes), RejectStore(encoded).read())
    claim.begin_change()
    if differ:
        staged = encoded.dataset()
        claim.retry(lambda: claim.upsert(staged.scanner(batch_size=1024).to_reader()))
    claim.retry(lambda: claim.delete(gone))
    claim.finish(compact=False)
    publish(job.table)
    # This also removes what abandoned syncs left. The manifests go first, so that a delta of which
    # only a part is removed is not taken for a table.
    session = job.table.file_session()
    for path in sorted(session.list(SYNCS), key=lambda path: "/_versions/" not in path):
        session.delete_file(path)
    return summary


def _rejects_name(changes: Changes) -> str:
    """Return the name under which the rejects of a sync are stored."""
    return f"sync-{changes.digest[:12]}"


def _delta_rows(delta: Iterable[list[Passage]]) -> Iterator[pa.RecordBatch]:
    for passages in delta:
        rows = [{"id": p.id, "text": p.text} for p in passages]
        yield pa.RecordBatch.from_pylist(rows, schema=DELTA_SCHEMA)
