"""Brings a complete table up to date with its corpus, encoding only what changed.

The new corpus is read and each passage compared, by id and text hash, with the row the table holds.
What is new or changed is written beside the table, encoded there by an ordinary, resumable job, and
then merged into the table by id. Readers on `live` keep the old version until all of it is done. An
interrupted sync is run again: the same changes have the same folder, so what was encoded is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from lance.file import LanceFileSession

from kalm_encoder import checkpoint
from kalm_encoder.errors import InputError, MismatchError
from kalm_encoder.rows import text_hash
from kalm_encoder.table import open_dataset
from pipeline.driver import EncodeJob, Executor, Summary, plan_job, run
from pipeline.duplicates import repeated
from pipeline.maintenance import Maintainer, publish
from pipeline.rejects import RejectStore
from pipeline.shards import Plan, ShardReader
from pipeline.sources import FieldOptions, Passage, Reject
from pipeline.writer import COMPLETE

logger = logging.getLogger(__name__)

FOLDER = "_kalm/sync"
DELTA_SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("text", pa.string())])


@dataclass
class Changes:
    """How a corpus differs from a table.

    Attributes:
        unchanged: passages whose text is what the table holds.
        changed: passages whose text differs.
        new: passages the table does not hold.
        missing: stable row ids of rows whose passage is no longer in the corpus.
        rejected: rows of the corpus that cannot be used.
        digest: of what is new or changed.
    """

    unchanged: int = 0
    changed: int = 0
    new: int = 0
    missing: list[int] = field(default_factory=list)
    rejected: list[Reject] = field(default_factory=list)
    digest: str = ""


def compare(job: EncodeJob, plan: Plan, on_duplicate: str = "error") -> Changes:
    """Compare a corpus with the table of `job`, by id and text hash; writes nothing.

    Raises:
        InputError: an id is repeated in the corpus and `on_duplicate` is "error".
    """
    return _Comparison(job, plan, on_duplicate).changes


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
    writer = Maintainer(job.uri, job.storage_options)
    _check_model(job, writer)
    comparison = _Comparison(job, plan_job(job), on_duplicate)
    changes = comparison.changes
    gone = changes.missing if delete_missing else []
    RejectStore(job.uri, job.storage_options).write_named("sync", changes.rejected)
    if changes.changed + changes.new + len(gone) == 0 and writer.state == COMPLETE:
        return changes, None
    summary = apply(job, execute, writer, comparison.delta, changes.digest, gone)
    return changes, summary


def apply(
    job: EncodeJob,
    execute: Executor,
    writer: Maintainer,
    delta: Callable[[], Iterator[Passage]] | None,
    digest: str,
    gone: list[int],
) -> Summary | None:
    """Encode passages beside the table, merge them into it by id, delete rows, publish."""
    folder = f"{job.uri.rstrip('/')}/{FOLDER}/{digest[:16]}"
    summary = None
    if delta is not None and next(delta(), None) is not None:
        source, encoded = f"{folder}/delta.lance", f"{folder}/encoded.lance"
        _write_delta(source, delta, job.storage_options)
        staging = replace(
            job, inputs=(source,), uri=encoded, fields=FieldOptions(), limit=None,
            new_generation=False, on_duplicate="error",
        )  # fmt: skip
        summary = run(staging, execute)
        RejectStore(job.uri, job.storage_options).write_named(
            f"sync-{digest[:12]}", RejectStore(encoded, job.storage_options).read()
        )
        writer.begin_change()
        staged = open_dataset(encoded, job.storage_options)
        writer.retry(lambda: writer.upsert(staged.scanner(batch_size=1024).to_reader()))
    else:
        writer.begin_change()
    writer.retry(lambda: writer.delete(gone))
    writer.finish(compact=False)
    publish(job.uri, job.storage_options)
    _drop_staged(job)
    return summary


def retry_rejects(job: EncodeJob, execute: Executor) -> Summary | None:
    """Encode the rejected rows of a complete table again, and add those that work now.

    Returns:
        What encoding did; None where no rejected row can be read as a passage.

    Raises:
        InputError: the table is not complete.
    """
    store = RejectStore(job.uri, job.storage_options)
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
    writer = Maintainer(job.uri, job.storage_options)
    _check_model(job, writer)
    summary = apply(job, execute, writer, delta, digest.hexdigest(), [])
    still = RejectStore(job.uri, job.storage_options).read_named(f"sync-{digest.hexdigest()[:12]}")
    store.keep_only({reject.id for reject in still})
    return summary


class _Comparison:
    """Reads the corpus shard by shard; remembers row ids and positions, never texts."""

    def __init__(self, job: EncodeJob, plan: Plan, on_duplicate: str) -> None:
        self._plan = plan
        self._storage_options = job.storage_options
        self._dataset = open_dataset(job.uri, job.storage_options)
        self._losers = self._repeated(on_duplicate)
        self.changes = Changes()
        digest = xxhash.xxh3_128()
        seen: list[np.ndarray] = [np.empty(0, np.int64)]
        for passages, rejects in self._shards():
            kinds, rows = self._classify(passages)
            seen.append(rows)
            self.changes.rejected += rejects
            for passage, kind in zip(passages, kinds, strict=True):
                setattr(self.changes, kind, getattr(self.changes, kind) + 1)
                if kind != "unchanged":
                    digest.update(passage.id.encode() + b"\0" + text_hash(passage.text))
        stored = self._dataset.scanner(columns=[], with_row_id=True).to_table()["_rowid"].to_numpy()
        self.changes.missing = np.setdiff1d(stored, np.concatenate(seen)).tolist()
        self.changes.digest = digest.hexdigest()

    def delta(self) -> Iterator[Passage]:
        """Yield the passages that are new or changed, reading the corpus again."""
        for passages, _ in self._shards():
            kinds, _ = self._classify(passages)
            yield from (p for p, k in zip(passages, kinds, strict=True) if k != "unchanged")

    def _classify(self, passages: list[Passage]) -> tuple[list[str], np.ndarray]:
        """Return the kind of each passage, and the row ids of those the table holds."""
        wanted = pc.field("id").isin(pa.array([p.id for p in passages], pa.string()))
        rows = self._dataset.scanner(
            columns=["id", "text_hash"], filter=wanted, with_row_id=True
        ).to_table()
        stored = dict(zip(rows["id"].to_pylist(), rows["text_hash"].to_pylist(), strict=True))
        kinds = []
        for passage in passages:
            old = stored.get(passage.id)
            same = old is not None and old == text_hash(passage.text)
            kinds.append("new" if old is None else "unchanged" if same else "changed")
        return kinds, rows["_rowid"].to_numpy().astype(np.int64)

    def _shards(self) -> Iterator[tuple[list[Passage], list[Reject]]]:
        """Yield the passages of each shard that count, and its rejects."""
        reader = ShardReader(self._storage_options)
        at = 0
        for shard in self._plan.shards:
            passages, rejects = reader.read(shard)
            numbers = np.arange(at, at + len(passages))
            at += len(passages)
            if len(self._losers):
                kept = ~np.isin(numbers, self._losers)
                passages = [p for p, keep in zip(passages, kept, strict=True) if keep]
            yield passages, rejects

    def _repeated(self, on_duplicate: str) -> np.ndarray:
        """Return the positions of passages whose id another passage has, and which do not count."""
        self._losers = np.empty(0, np.int64)
        first: list[str] = []

        def scan() -> Iterator[tuple[list[str], np.ndarray]]:
            at = 0
            for passages, _ in self._shards():
                yield [p.id for p in passages], np.arange(at, at + len(passages))
                at += len(passages)

        keep = "first" if on_duplicate == "error" else on_duplicate
        losers = np.sort(np.concatenate([self._losers, *repeated(scan, self._plan.num_rows, keep)]))
        if len(losers) and on_duplicate == "error":
            for ids, numbers in scan():
                first += [ids[n - numbers[0]] for n in losers if numbers[0] <= n <= numbers[-1]]
                if len(first) >= 10:
                    break
            raise InputError(
                f"{len(losers)} passages repeat an id of another: "
                f"{', '.join(map(repr, first[:10]))}. Mend the corpus, or choose one with "
                "--on-duplicate first or last"
            )
        return losers


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
    session = LanceFileSession(job.uri, storage_options=job.storage_options)
    staged = {path.split(".lance/")[0] for path in session.list(FOLDER) if ".lance/" in path}
    for path in sorted(staged):
        uri = f"{job.uri.rstrip('/')}/{path[path.index(FOLDER) :]}.lance"
        lance.LanceDataset.drop(uri, storage_options=job.storage_options)


def _check_model(job: EncodeJob, writer: Maintainer) -> None:
    fingerprint = checkpoint.resolve(job.model, job.revision).fingerprint
    if fingerprint != writer.spec.fingerprint:
        raise MismatchError(
            "fingerprint",
            f"{job.uri} was made by a model with fingerprint {writer.spec.fingerprint}, "
            f"{job.model} has {fingerprint}: states of two models cannot be mixed. "
            "Use the same model, or encode with --new-generation",
        )
