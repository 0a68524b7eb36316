"""Carries out what a comparison found: the second half of a sync.

Passages that are new or changed are staged beside the table and encoded there by an ordinary job;
rows of which the metadata or the id changed alone are staged as they will be. Then all of them are
merged in by id, other rows are deleted, and the table is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import lance

from kalm_encoder.table.location import Location
from pipeline.corpus.erased import ErasedIds
from pipeline.messages import Executor
from pipeline.run.driver import Summary, run
from pipeline.run.job import EncodeJob
from pipeline.table.claim import COMPLETE
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import SealedTable
from pipeline.table.publish import publish, publish_rest
from pipeline.table.rejects import RejectStore
from pipeline.table.side_files import SYNCS, is_data
from pipeline.table.steps import Steps
from pipeline.upkeep.comparison.corpus import Corpus
from pipeline.upkeep.comparison.differences import Changes, Groups
from pipeline.upkeep.delta import DeltaWork, UpdatesWork, delta_fields, stage

GONE = "rows that the corpus lacks"


def apply_changes(
    job: EncodeJob,
    execute: Executor,
    claim: SealedTable,
    dataset: lance.LanceDataset,
    corpus: Corpus,
    changes: Changes,
    *,
    gone: Sequence[Groups] = (),
    deleted: Sequence[int] = (),
    record: dict[str, str] | None = None,
) -> Summary | None:
    """Encode passages beside the table, merge rows in by id, delete rows, and publish.

    Args:
        job: The table and its settings.
        execute: Encodes the passages, and does the other steps.
        claim: The table, at the version that the changes were chosen by.
        dataset: The same version.
        corpus: What the table is to hold.
        changes: What differs. Its digests name the folders in which rows are staged.
        gone: Rows to delete.
        deleted: Stable row ids of others to delete.
        record: Schema metadata by which the table remembers what was applied.
    """
    steps, record = Steps(execute), record or {}
    differ = changes.changed + changes.new > 0
    is_done = not (
        differ or changes.metadata_changed or deleted or any(rows.files for rows in gone)
    )
    is_done = is_done and claim.metadata.items() >= record.items()
    if is_done and claim.state == COMPLETE and not claim.without_index(job.index_columns):
        publish_rest(job.table)
        return None
    encoded = job.table / f"{SYNCS}/{changes.digest}/encoded.lance"
    updated = job.table / f"{SYNCS}/{changes.update_digest:032x}/updates.lance"
    summary = None
    if differ:
        summary = _encode(job, steps, claim, dataset, corpus, changes, encoded)
    if changes.metadata_changed:
        chosen = changes.to_update
        stage(steps, UpdatesWork, job.table, dataset, corpus, chosen, changes.name, updated)
    claim.begin_change()
    staged = [encoded] * differ + [updated] * (changes.metadata_changed > 0)
    if staged:
        claim.retry(lambda: claim.merge(steps, staged))
    for rows in gone:
        if rows.files:
            claim.retry(partial(claim.delete_rows, steps, rows.files, rows.numbers, GONE))
    claim.retry(lambda: claim.delete(deleted))
    claim.finish(steps, compact=False, index_columns=job.index_columns, record=record)
    publish(job.table)
    _remove_staged(job)
    return summary


def _encode(
    job: EncodeJob,
    steps: Steps,
    claim: SealedTable,
    dataset: lance.LanceDataset,
    corpus: Corpus,
    changes: Changes,
    encoded: Location,
) -> Summary:
    """Stage the passages that are new or changed, and encode them."""
    spec = claim.spec
    source = job.table / f"{SYNCS}/{changes.digest}/delta.lance"
    chosen = changes.to_encode
    stage(steps, DeltaWork, job.table, dataset, corpus, chosen, changes.name, source)
    staging = replace(
        job, inputs=(source.uri,), uri=encoded.uri, fields=delta_fields(spec), limit=None,
        new_generation=False, on_duplicate="error", index_columns=(), split=None,
    )  # fmt: skip
    computed = spec.compute_dtype or job.compute_dtype
    like = replace(spec, compute_dtype=computed, split=None)  # they are split by now
    summary = run(staging, steps.execute, like=like)
    RejectStore(job.table).write(rejects_name(changes), RejectStore(encoded).read())
    return summary


@contextmanager
def removed_if_erased(job: EncodeJob, erased: ErasedIds) -> Iterator[None]:
    """Remove what a sync has left if it fails and more ids than these have been erased meanwhile.

    The erasure could not remove what was written after it.
    """
    try:
        yield
    except BaseException:
        if erased_ids(job.table) != erased:
            _remove_staged(job)
        raise


def _remove_staged(job: EncodeJob) -> None:
    """Remove what syncs have compared and staged, abandoned ones too.

    The manifests and records go first, so that what is removed in part is not taken for whole.
    """
    session = job.table.file_session()
    for path in sorted(session.list(SYNCS), key=is_data):
        session.delete_file(path)


def rejects_name(changes: Changes) -> str:
    """Return the name under which the rejects of a sync are stored."""
    return f"sync-{changes.digest[:12]}"
