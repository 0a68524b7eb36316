"""What each run did, shards and commits: JSON lines in `<table>/_kalm/runs/`, beside the rows.

A line with `"kind": "commit"` is a commit, all others are shards. For people and figures only; no
job reads them, and a store that refuses them costs a warning. A run keeps them in memory and writes
those it has every so often, at a commit, and at its end: a killed run loses the last half minute of
them. A run that begins a table or a generation drops those of earlier ones. A part is written anew
until it holds PART_RECORDS, then the next one begins: what is written again stays small however
long a run is.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lance.file import LanceFileSession

from kalm_encoder.errors import first_line
from pipeline.table.side_files import RUNS, STORE_ERRORS, read_text, write_text

if TYPE_CHECKING:
    from pipeline.messages import ShardResult

logger = logging.getLogger(__name__)

WRITE_EVERY_S = 30.0
PART_RECORDS = 1000
WAITING = ("wait", "queued", "idle")
"""Stages in which a worker did nothing for the shard; "wait" is the name of "queued" of old."""
COMMIT = "commit"


@dataclass(frozen=True)
class ShardRecord:
    """One encoded shard.

    Attributes:
        run: UTC start and random name of the run.
        at_s: seconds from the start of the run to the shard's arrival at the driver.
        shard: its number in the plan.
        rows: written.
        rejected: rows that were not.
        tokens: real tokens encoded.
        padded_tokens: tokens computed, padding included.
        truncated: passages cut to max_length.
        seconds: by stage.
        worker: host and process, or "".
        waited_s: from its arrival to the commit that holds it; None where it came to none, and in
            records older than this field.
    """

    run: str
    at_s: float
    shard: int
    rows: int
    rejected: int
    tokens: int
    padded_tokens: int
    truncated: int
    seconds: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    waited_s: float | None = None

    @property
    def worked_s(self) -> float:
        """Seconds of its worker's stages, waiting left out."""
        return sum(spent for stage, spent in self.seconds.items() if stage not in WAITING)


@dataclass(frozen=True)
class CommitRecord:
    """One commit.

    Attributes:
        run: as in ShardRecord.
        at_s: seconds from the start of the run to the end of the commit.
        shards, rows: in it.
        seconds: it took.
        version: of the table after it.
        results_s: how long the driver had waited for results since the commit before.
    """

    run: str
    at_s: float
    shards: int
    rows: int
    seconds: float
    version: int
    results_s: float


class RunRecorder:
    """Collects the records of one run and writes them beside its table."""

    def __init__(self, uri: str, run: str, storage_options: dict[str, str] | None = None) -> None:
        self._session = LanceFileSession(uri, storage_options=storage_options)
        self.run = run
        self._began = self._written_at = time.monotonic()
        self._arrived: dict[int, ShardRecord] = {}
        self._lines: list[str] = []
        self._part = self._written = 0

    def at_s(self) -> float:
        """Return seconds since the run began."""
        return round(time.monotonic() - self._began, 3)

    def forget_earlier(self) -> None:
        """Drop the records of earlier runs: nothing of what they did is in the table."""
        try:
            for path in self._session.list(RUNS):
                self._session.delete_file(path)
        except STORE_ERRORS as error:
            logger.warning("records of earlier runs are still there: %s", first_line(error))

    def add(self, result: ShardResult) -> ShardRecord:
        """Note a shard that has just arrived."""
        record = ShardRecord(
            run=self.run,
            at_s=self.at_s(),
            shard=result.shard.number,
            rows=result.num_rows,
            rejected=len(result.rejects),
            tokens=result.num_tokens,
            padded_tokens=result.padded_tokens,
            truncated=result.num_truncated,
            seconds={stage: round(spent, 4) for stage, spent in result.seconds.items()},
            worker=result.worker,
        )
        self._arrived[record.shard] = record
        return record

    def add_commit(
        self, results: Iterable[ShardResult], *, seconds: float, version: int, results_s: float
    ) -> CommitRecord:
        """Note a commit that has just ended, and how long its shards waited for it."""
        at_s = self.at_s()
        numbers = [result.shard.number for result in results]
        held = [self._arrived.pop(number) for number in numbers if number in self._arrived]
        for shard in held:
            waited_s = round(max(0.0, at_s - seconds - shard.at_s), 3)
            self._note(asdict(replace(shard, waited_s=waited_s)))
        rows = sum(shard.rows for shard in held)
        commit = CommitRecord(
            self.run, at_s, len(held), rows, round(seconds, 4), version, round(results_s, 3)
        )
        self._note({"kind": COMMIT, **asdict(commit)})
        return commit

    def write_if_due(self) -> None:
        """Write if it is time to."""
        if time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.write()

    def close(self) -> None:
        """Write all there is, shards that came to no commit too."""
        for shard in self._arrived.values():
            self._note(asdict(shard))
        self._arrived.clear()
        self.write()

    def write(self) -> None:
        """Write what is new; where the store refuses, say so and keep it for the next time."""
        self._written_at = time.monotonic()
        if len(self._lines) == self._written:
            return
        try:
            path = f"{RUNS}/{self.run}-{self._part:05d}.jsonl"
            write_text(self._session, path, "".join(self._lines))
        except STORE_ERRORS as error:
            logger.warning("the records of this run are not written yet: %s", first_line(error))
            return
        self._written = len(self._lines)
        if self._written >= PART_RECORDS:
            self._lines.clear()
            self._part, self._written = self._part + 1, 0

    def _note(self, record: dict[str, Any]) -> None:
        self._lines.append(json.dumps(record) + "\n")


def read_records(uri: str, storage_options: dict[str, str] | None = None) -> list[ShardRecord]:
    """Return the shards of all runs that encoded for the table, by run, then by time."""
    return [ShardRecord(**line) for kind, line in _lines(uri, storage_options) if kind is None]


def read_commits(uri: str, storage_options: dict[str, str] | None = None) -> list[CommitRecord]:
    """Return the commits of all runs that encoded for the table; earlier releases noted none."""
    return [CommitRecord(**line) for kind, line in _lines(uri, storage_options) if kind == COMMIT]


def _lines(
    uri: str, storage_options: dict[str, str] | None
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    session = LanceFileSession(uri, storage_options=storage_options)
    for path in sorted(session.list(RUNS)):
        for line in read_text(session, path).splitlines():
            record = json.loads(line)
            yield record.pop("kind", None), record
