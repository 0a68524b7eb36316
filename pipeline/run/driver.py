"""A whole job: plan, take the table, hand shards out, commit what comes back, finish the table.

Running the same job again resumes it. The driver never encodes on its own account: shards come back
from an executor, either `inline.encode_inline` or `workers.on_ray`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from kalm_encoder.errors import (
    FencedError,
    IncompleteError,
    InputError,
    TooManyRejectsError,
)
from kalm_encoder.model import checkpoint
from kalm_encoder.model.encoder import check_max_length
from kalm_encoder.table.location import Location
from kalm_encoder.table.spec import TableSpec
from pipeline import logs
from pipeline.corpus.inputs import absolute
from pipeline.corpus.shards import Plan
from pipeline.messages import Executor, Outcome, ShardFailure, WorkerConfig
from pipeline.run.job import EncodeJob, plan_job
from pipeline.run.kept_plan import PlanCopy
from pipeline.run.progress import Progress
from pipeline.table.committer import Committer
from pipeline.table.duplicates import ON_DUPLICATE, repeated_rows
from pipeline.table.finish import SealedTable
from pipeline.table.ledger import REJECTED, Ledger
from pipeline.table.preflight import check_writable
from pipeline.table.publish import publish
from pipeline.table.rejects import RejectStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What one run did, and what the table holds now."""

    uri: str
    num_rows: int
    num_rejected: int
    num_repeated: int
    live: bool
    shards_encoded: int
    tokens_per_s: float
    padding: float
    truncated: int
    elapsed_s: float
    seconds: dict[str, float]


@logs.in_run()
def run(job: EncodeJob, execute: Executor) -> Summary:
    """Encode what is missing of a job and finish its table.

    Raises:
        InputError: bad input, model, settings or table; nothing was written.
        FencedError: another driver took the table over.
        TooManyRejectsError: more rows rejected than allowed; what is committed stays.
        IncompleteError: some shards failed for good; all others are committed.
    """
    files = checkpoint.resolve(job.model, job.revision)
    tokenizer = files.tokenizer()
    for answer in ("yes", "no"):
        checkpoint.answer_token_id(tokenizer, answer)
    check_max_length(job.max_length, tokenizer, files.config.encoder.text_config)
    if job.on_duplicate not in ON_DUPLICATE:
        raise InputError(
            f"on_duplicate {job.on_duplicate!r} is not one of {', '.join(ON_DUPLICATE)}"
        )
    copy = PlanCopy(job)
    plan = copy.read() or plan_job(job, copy.files)
    spec = TableSpec(
        model=files.name if files.revision else str(files.path),
        revision=files.revision,
        fingerprint=files.fingerprint,
        dim=files.config.decoder.hidden_size,
        max_length=job.max_length,
        ratios=job.ratios,
        store_dtype=job.store_dtype,
        keep_text=job.keep_text,
    )
    return load(job, plan, spec, execute, copy)


@logs.in_run()
def load(
    job: EncodeJob, plan: Plan, spec: TableSpec, execute: Executor, copy: PlanCopy | None = None
) -> Summary:
    """Bring a table to hold what a plan says: what `run` does once plan and spec are known.

    Args:
        job: settings.
        plan: the shards the table is to hold.
        spec: what it is to record.
        execute: encodes shards.
        copy: where to keep the plan once the table is begun.

    Raises:
        FencedError, TooManyRejectsError, IncompleteError, MismatchError: as `run`.
    """
    # Workers have another working directory.
    table = Location(absolute(job.uri), job.storage_options)
    check_writable(table)
    ledger = Ledger.begin(table, spec, plan, new_generation=job.new_generation)
    if copy:
        copy.write(plan)
    before = len(ledger.done)
    pending = [shard for shard in plan.shards if shard.number not in ledger.done]
    logger.info(
        "%s: %d rows in %d shards, %d done, %d to do",
        job.uri, plan.num_rows, len(plan.shards), before, len(pending),
    )  # fmt: skip
    with Progress(table.uri, plan, pending, job.storage_options) as progress:
        live = _fill(job, plan, spec, ledger, progress, execute)
    rejected = int(ledger.metadata[REJECTED])
    rows = table.dataset().count_rows()
    return Summary(
        uri=job.uri,
        num_rows=rows,
        num_rejected=rejected,
        num_repeated=plan.num_rows - rejected - rows,
        live=live,
        shards_encoded=len(pending),
        tokens_per_s=progress.work.tokens_per_s,
        padding=progress.work.padding,
        truncated=progress.work.truncated,
        elapsed_s=progress.work.seconds,
        seconds=progress.work.stages,
    )


def _fill(
    job: EncodeJob,
    plan: Plan,
    spec: TableSpec,
    ledger: Ledger,
    progress: Progress,
    execute: Executor,
) -> bool:
    """Encode what is pending and finish the table; returns whether it is live."""
    config = WorkerConfig(
        ledger.location.uri,
        spec,
        token_budget=job.token_budget,
        compile=job.compile,
        storage_options=job.storage_options,
        logs=logs.current(),
    )
    with contextlib.closing(execute(config, progress.pending)) as outcomes:
        failures = _encode(job, plan, ledger, progress, outcomes) if progress.pending else []
    progress.encoded()
    if failures:
        lines = [f"{f.shard.path} shard {f.shard.id}: {f.reason}" for f in failures]
        raise IncompleteError(
            f"{len(failures)} of {len(plan.shards)} shards failed, all others are in {job.uri}. "
            "Mend the cause and run the same command again.\n" + "\n".join(lines[:20])
        )
    return _finish(job, ledger)


def _finish(job: EncodeJob, ledger: Ledger) -> bool:
    """Seal, finish and publish; each step is skipped where done. Returns whether it is live."""
    if not ledger.sealed:
        if job.on_duplicate == "error":
            _refuse_repeated(job, ledger)
        ledger.seal(job.on_duplicate)
    SealedTable(ledger.location).finish()
    if ledger.generation == 1 or ledger.is_live():
        publish(ledger.location)
        return True
    return False


def _refuse_repeated(job: EncodeJob, ledger: Ledger) -> None:
    repeated = list(repeated_rows(ledger.dataset, "first"))
    if repeated:
        total = sum(map(len, repeated))
        rows = ledger.dataset._take_rows(repeated[0][:10].tolist(), columns=["id", "shard_id"])
        shown = ", ".join(map(repr, rows["id"].to_pylist()))
        raise InputError(
            f"{total} rows repeat an id: {shown}. All rows are encoded: run again with "
            "--on-duplicate first or last to keep one of each, nothing is encoded twice; or mend "
            f"the input and choose another table than {job.uri}"
        )


def _encode(
    job: EncodeJob, plan: Plan, ledger: Ledger, progress: Progress, outcomes: Iterator[Outcome]
) -> list[ShardFailure]:
    """Commit shards as they arrive; whatever ends the run, what has arrived is committed first."""
    allowed = int(job.max_rejected * plan.num_rows)
    rejected = progress.before - ledger.num_rows
    rejects = RejectStore(ledger.location)
    if not ledger.done:
        rejects.clear()  # of an earlier attempt, with other input
        progress.recorder.forget_earlier()
    failures: list[ShardFailure] = []
    committer = Committer(ledger, job.commit_every_s, progress.committed)
    try:
        for outcome in progress.received(outcomes):
            if isinstance(outcome, ShardFailure):
                failures.append(outcome)
                with logs.in_shard(outcome.shard.id):
                    logger.error("gave up shard %s: %s", outcome.shard.id, outcome.reason)
            elif outcome is not None:
                rejects.write(outcome.shard.id, outcome.rejects)
                committer.add(outcome)
                rejected += len(outcome.rejects)
                if rejected > allowed:
                    last = outcome.rejects[-1]
                    raise TooManyRejectsError(
                        f"{rejected} rows rejected, {allowed} of {plan.num_rows} are allowed. "
                        f"The last: {last.path} line {last.line}: {last.reason}. All are in "
                        f"{rejects.location}; mend the input, or raise --max-rejected and run again"
                    )
            committer.commit_if_due()
    except FencedError:
        raise
    except BaseException:
        committer.commit()
        raise
    else:
        committer.commit()
    return failures
