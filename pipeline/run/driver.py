"""The whole of a job: plan, claim the table, hand shards out, commit what comes back, finish.

Running the same job again resumes it. The driver never encodes: shards come back from an executor,
either `workers.local` or `workers.on_ray`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kalm_encoder.errors import FencedError, IncompleteError, InputError, TooManyRejectsError
from kalm_encoder.model import checkpoint
from kalm_encoder.model.tokens import check_max_length
from kalm_encoder.table.spec import SPLIT_COLUMNS, TableSpec
from pipeline import logs
from pipeline.corpus.erased import ErasedIds
from pipeline.corpus.shards import Plan
from pipeline.corpus.splitting import check_no_choice
from pipeline.messages import Executor, Failure, Outcome, Work
from pipeline.run.first_look import first_look, id_field_remedy
from pipeline.run.job import EncodeJob, TableJob, plan_job
from pipeline.run.kept_plan import KeptPlan
from pipeline.run.progress import Progress
from pipeline.run.records import RunTotals
from pipeline.run.run_files import ENCODING
from pipeline.run.traces import trace_run, trace_shard
from pipeline.table.committer import Committer
from pipeline.table.duplicates import DUPLICATE_POLICIES, find_repeated, rows_at
from pipeline.table.erasures import erased_ids
from pipeline.table.finish import SealedTable, check_index_columns, finish_folder
from pipeline.table.ledger import REJECTED, Ledger
from pipeline.table.preflight import check_writable
from pipeline.table.publish import publish
from pipeline.table.rejects import RejectStore
from pipeline.table.steps import SHOWN_FAILURES, Steps
from pipeline.workers.encode_work import EncodeWork

logger = logging.getLogger(__name__)

WorkOf = Callable[[TableSpec, ErasedIds], Work]
"""Makes a work from the spec of the table and the ids that may not come back to it."""

MEND_LATER = (
    "Others are encoded already. To keep them, run again with a higher --max-rejected, then mend "
    "the rejected rows in their files and add --retry-rejects. To begin anew with mended files, "
    "add --new-generation"
)


@dataclass(frozen=True)
class Summary:
    """A summary of what one run did, and of what the table holds now.

    Attributes:
        uri: Address of the table, as the user gave it.
        num_rows: Number of rows in the table.
        num_rejected: Number of input rows that are not encoded.
        num_repeated: Number of rows dropped because their id occurs twice.
        live: Whether readers see these rows.
        shards_encoded: Number of shards that this run encoded.
        totals: What this run encoded, all shards together.
    """

    uri: str
    num_rows: int
    num_rejected: int
    num_repeated: int
    live: bool
    shards_encoded: int
    totals: RunTotals


@logs.in_run()
def run(job: EncodeJob, execute: Executor, *, like: TableSpec | None = None) -> Summary:
    """Encode what is missing of a job and finish its table.

    Args:
        job: What the user asks for.
        execute: The function that encodes shards.
        like: Spec of the table to which the rows will be moved. None makes one from the job.

    Raises:
        InputError: Bad input, model, settings or table; nothing was written.
        FencedError: Another driver took the table over.
        TooManyRejectsError: More rows were rejected than allowed; what is committed stays.
        IncompleteError: Some shards failed for good; all others are committed.
    """
    files = checkpoint.resolve(job.model, job.revision)
    tokenizer = files.tokenizer()
    for answer in ("yes", "no"):
        checkpoint.answer_token_id(tokenizer, answer)
    check_max_length(job.max_length, tokenizer, files.config.encoder.text_config)
    if job.on_duplicate not in DUPLICATE_POLICIES:
        raise InputError(
            f"on_duplicate {job.on_duplicate!r} is not one of {', '.join(DUPLICATE_POLICIES)}"
        )
    if job.split:
        check_no_choice(job.on_duplicate)
    kept = KeptPlan(job)
    known = kept.read()
    plan = known or plan_job(job, kept.files, execute)
    log_readings(plan)

    def begun(ledger: Ledger) -> None:
        if not known:
            kept.write(plan)
        if not ledger.done:
            first_look(job, plan)

    model = files.recorded_name
    spec = like or TableSpec(
        model=model,
        revision=files.revision,
        fingerprint=files.fingerprint,
        files_hash=files.files_hash,
        weights_hash=files.weights_hash,
        dim=files.config.decoder.hidden_size,
        max_length=job.max_length,
        ratios=job.ratios,
        store_dtype=job.store_dtype,
        keep_text=job.keep_text,
        compute_dtype=job.compute_dtype,
        metadata_columns=plan.metadata_columns + (SPLIT_COLUMNS if job.split else ()),
        split=job.split,
    )
    if job.split:  # what groups passages, and finds those of a document
        job = replace(job, index_columns=(*job.index_columns, "doc_id"))
    spec = replace(spec, model=model, revision=files.revision)
    return load(job, plan, spec, execute, begun)


def log_readings(plan: Plan) -> None:
    """Log how the files of a plan are read, and which options choose another reading."""
    for reading in plan.readings:
        logger.info("reading %s", reading)


@logs.in_run()
def load(
    job: TableJob,
    plan: Plan,
    spec: TableSpec,
    execute: Executor,
    begun: Callable[[Ledger], None] = lambda ledger: None,
    work: WorkOf | None = None,
    doing: str = ENCODING,
) -> Summary:
    """Make a table hold what a plan says. This is what `run` does once plan and spec are known.

    Args:
        job: Which table, and how it is filled.
        plan: The shards that the table is to hold.
        spec: What the table records of the model and the settings.
        execute: The function that does the work on shards.
        work: Makes the work that writes a shard as a fragment, from the spec of the table and the
            erased ids. None encodes.
        doing: What the work does, for the run view.
        begun: What is to happen once the table is begun or taken over, before anything is encoded.

    Raises:
        FencedError, TooManyRejectsError, IncompleteError, MismatchError: As in `run`.
        InputError: If a column to index is no metadata column.
    """
    check_index_columns(job.index_columns, spec)
    check_writable(job.table)
    ledger = Ledger.begin(job.table, spec, plan, new_generation=job.new_generation)
    begun(ledger)
    pending = [shard for shard in plan.shards if shard.number not in ledger.done]
    logger.info(
        "%s: %d rows in %d shards, %d done, %d to do",
        job.uri, plan.num_rows, len(plan.shards), len(ledger.done), len(pending),
    )  # fmt: skip
    settings = replace(ledger.spec, model=spec.model, revision=spec.revision)
    settings = replace(settings, compute_dtype=settings.compute_dtype or spec.compute_dtype)
    erased = erased_ids(job.table)
    trace_run(job.table, plan, len(pending), doing)
    with Progress(job.table, plan, pending, doing) as progress:
        if pending:
            make = work or _encoding(job)
            with contextlib.closing(execute(make(settings, erased), pending)) as outcomes:
                allowed = int(job.max_rejected * plan.num_rows) + len(erased.hashes)
                _commit_all(job, plan, ledger, progress, outcomes, allowed)
        progress.encoded()
        live = _finish(job, plan, ledger, Steps(execute, progress.step))
    rejected = int(ledger.metadata[REJECTED])
    rows = job.table.dataset().count_rows()
    return Summary(
        uri=job.uri,
        num_rows=rows,
        num_rejected=rejected,
        num_repeated=0 if spec.split else plan.num_rows - rejected - rows,
        live=live,
        shards_encoded=len(pending),
        totals=progress.totals,
    )


def _encoding(job: TableJob) -> WorkOf:
    """Return what makes the work of encoding for a job."""

    def make(spec: TableSpec, erased: ErasedIds) -> Work:
        return EncodeWork(table=job.table, spec=spec, token_budget=job.token_budget, erased=erased)

    return make


def _commit_all(
    job: TableJob,
    plan: Plan,
    ledger: Ledger,
    progress: Progress,
    outcomes: Iterator[Outcome],
    allowed: int,
) -> None:
    """Commit shards as they arrive; whatever ends the run, what has arrived is committed first."""
    rejected = max(0, progress.before - ledger.num_rows)
    rejects = RejectStore(job.table)
    if not ledger.done:
        rejects.clear()  # what is there comes from an earlier attempt, with other input
        progress.files.forget_earlier()
    failures: list[Failure] = []
    committer = Committer(ledger, job.commit_every_s, progress.committed)
    try:
        for outcome in progress.received(outcomes):
            trace_shard(outcome)
            if isinstance(outcome, Failure):
                failures.append(outcome)
                with logs.in_shard(outcome.unit.id):
                    logger.error("gave up shard %s: %s", outcome.unit.id, outcome.reason)
            elif outcome is not None:
                ledger.admit(outcome)
                rejects.write(outcome.shard.id, outcome.rejects)
                committer.add(outcome)
                rejected += len(outcome.rejects)
                if rejected > allowed:
                    words = rejects.too_many(outcome.rejects, rejected, allowed, plan.num_rows)
                    raise TooManyRejectsError(f"{words}. {MEND_LATER}")
            committer.commit_if_due()
    except FencedError:
        committer.waiting.clear()  # another driver encodes these shards
        raise
    finally:
        committer.commit()
    if failures:
        lines = [f"{f.unit.path} shard {f.unit.id}: {f.reason}" for f in failures]
        raise IncompleteError(
            f"{len(failures)} of {len(plan.shards)} shards failed, all others are in {job.uri}. "
            "Mend the cause and run the same command again.\n" + "\n".join(lines[:SHOWN_FAILURES])
        )


def _finish(job: TableJob, plan: Plan, ledger: Ledger, steps: Steps) -> bool:
    """Seal, finish and publish; each step is skipped where done. Returns whether it is live."""
    if not ledger.sealed:
        if job.on_duplicate == "error":
            _refuse_repeated(plan, ledger, steps)
        # A document has many rows, so that those of the table do not tell how many were rejected.
        rejected = len(RejectStore(job.table).read()) if ledger.spec.split else None
        ledger.seal(job.on_duplicate, rejected)
    SealedTable(job.table).finish(steps, index_columns=job.index_columns)
    if ledger.generation == 1 or ledger.is_live():
        publish(job.table)
        return True
    return False


def _refuse_repeated(plan: Plan, ledger: Ledger, steps: Steps) -> None:
    folder = finish_folder(ledger.location, ledger.dataset)
    repeated = find_repeated(steps, ledger.location, ledger.dataset, "first", folder)
    if repeated.count:
        rows = rows_at(ledger.dataset, repeated.shown[:10], ["id"])
        shown = ", ".join(map(repr, rows["id"].to_pylist()))
        remedy = id_field_remedy(s.fields for s in plan.shards)
        raise InputError(
            f"{repeated.count} rows repeat an id: {shown}. All rows are encoded: run again with "
            "--on-duplicate first or last to keep one row of each id (nothing is encoded twice). "
            f"{remedy}, and add --new-generation to begin anew, as for a mended file"
        )
