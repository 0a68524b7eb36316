"""Brings a complete table up to date with its corpus and encodes only what changed.

Each passage of the new corpus is compared, by id and text hash, with the row that the table holds
(comparison/), and what differs is carried out (apply.py). Readers of the live version see the old
rows until all of this is done. An interrupted sync is simply run again: the same changes go to the
same folder, so passages that were encoded are not encoded again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import lance

from kalm_encoder.errors import MismatchError
from kalm_encoder.model import checkpoint
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.shards import Plan, Shard
from pipeline.corpus.splitting import check_no_choice
from pipeline.messages import Executor
from pipeline.run.driver import Summary, log_readings
from pipeline.run.job import EncodeJob, plan_job
from pipeline.table.claim import metadata_of
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import SealedTable, check_index_columns
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import SYNCS
from pipeline.table.steps import Steps
from pipeline.upkeep.apply import apply_changes, rejects_name, removed_if_erased
from pipeline.upkeep.changes import changed_since, hub_record, read_feed, source_record
from pipeline.upkeep.comparison.compare import compared
from pipeline.upkeep.comparison.corpus import Corpus, Reading, places_of
from pipeline.upkeep.comparison.differences import Changes
from pipeline.upkeep.delete import passages_and_documents, row_ids_of


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
        execute: Plans a large corpus, and encodes the passages that are new or changed.
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
    plan = _plan(job, dataset, execute, is_feed)
    log_readings(plan)
    corpus = _corpus(job, dataset, plan.shards, on_duplicate)
    steps, metadata, feed = Steps(execute), metadata_of(dataset), None
    if is_feed:
        feed = read_feed(plan, metadata, job.storage_options)
    elif since is not None:
        feed = changed_since(steps, job.table, plan, since, metadata)
    gone: list[int] = []
    if feed is not None:
        corpus = corpus.only(feed.lines)
        deleted = feed.deleted
        if corpus.reading.spec.split:
            deleted = list(passages_and_documents(dataset, deleted))
        gone = list(row_ids_of(dataset, deleted).values())
    with (
        removed_if_erased(job, corpus.reading.erased),
        compared(steps, job.table, dataset, corpus, on_duplicate, job.table / SYNCS) as changes,
    ):
        rejects = changes.rejects()
        if feed is not None:
            changes.missing = len(gone)
            changes.rejected += len(feed.rejects)
            rejects = chain(rejects, feed.rejects)
        if claim is None:
            return changes, None
        RejectStore(job.table).write("sync", rejects)
        record = (source_record(plan) or {}) if feed is None else feed.record
        return changes, apply_changes(
            job, execute, claim, dataset, corpus, changes, deleted=gone,
            gone=[changes.surplus_rows] + [changes.missing_rows] * delete_missing,
            record=record | hub_record(plan),
        )  # fmt: skip


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
    whole = _corpus(job, dataset, _plan(job, dataset, execute).shards)
    corpus = whole.only(places_of(whole.shards, wanted))
    read = corpus.reading.open()
    retried = {
        passage.id: (shard.path, passage.line)
        for part in corpus.parts()
        for shard, rows in read(part.what)
        for passage in rows.passages
    }
    if not retried:
        return None
    with (
        removed_if_erased(job, corpus.reading.erased),
        compared(Steps(execute), job.table, dataset, corpus, place=job.table / SYNCS) as changes,
    ):
        summary = apply_changes(job, execute, claim, dataset, corpus, changes)
        failed = retried.keys() & {reject.id for reject in store.read(rejects_name(changes))}
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
    spec, files = claim.spec, checkpoint.resolve(job.model, job.revision)
    if not files.made(spec.fingerprint, spec.files_hash):
        raise MismatchError(
            "fingerprint",
            f"{job.uri} was made by a model with fingerprint {spec.fingerprint}, "
            f"{job.model} has {files.fingerprint}: states of two models cannot be mixed. Use the "
            "same model, encode with --new-generation, or try `kalm adopt` if its weights are the "
            "same",
        )
    computed = claim.spec.compute_dtype
    if computed and job.compute_dtype not in (None, computed):
        raise MismatchError(
            "compute_dtype",
            f"the states of {job.uri} were computed in {computed}, not in {job.compute_dtype}: "
            "leave --dtype out, or encode with --new-generation",
        )
    return claim


def _plan(
    job: EncodeJob, dataset: lance.LanceDataset, execute: Executor, is_feed: bool = False
) -> Plan:
    """Plan the inputs of a job; they give the metadata columns of its table.

    Raises:
        MismatchError: If the job keeps other columns.
    """
    columns = TableSpec.from_metadata(dataset.schema.metadata, job.uri).corpus_columns
    fields = replace(job.fields, keep=job.fields.keep or columns, is_feed=is_feed)
    plan = plan_job(replace(job, fields=fields), execute=execute)
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


def _corpus(
    job: EncodeJob,
    dataset: lance.LanceDataset,
    shards: Sequence[Shard],
    on_duplicate: str = "error",
) -> Corpus:
    """Return how the inputs of a job are read; documents are cut as those of its table were.

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
    if spec.split is not None:
        check_no_choice(on_duplicate)
    erased = erased_ids(job.table)
    return Corpus(Reading(spec, job.model, job.revision, erased, job.storage_options), shards)
