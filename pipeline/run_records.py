"""What each run did, shard by shard: JSON lines in `<table>/_kalm/runs/`, written beside the rows.

For people and figures only; no job reads them, and a store that refuses them costs a warning. A
run keeps them in memory and writes those it has every so often, at a commit, and at its end: a
killed run loses the last half minute of them. A run that begins a table or a generation drops
those of earlier ones. A part is written anew until it holds PART_RECORDS, then the next one begins:
what is written again stays small however long a run is.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lance.file import LanceFileSession

from kalm_encoder.table import first_line

if TYPE_CHECKING:
    from pipeline.encode_shard import ShardResult

logger = logging.getLogger(__name__)

FOLDER = "_kalm/runs"
WRITE_EVERY_S = 30.0
PART_RECORDS = 1000


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


class RunRecorder:
    """Collects the records of one run and writes them beside its table."""

    def __init__(self, uri: str, storage_options: dict[str, str] | None = None) -> None:
        self._session = LanceFileSession(uri, storage_options=storage_options)
        self.run = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}"
        self._began = self._written_at = time.monotonic()
        self._lines: list[str] = []
        self._part = self._written = 0

    def forget_earlier(self) -> None:
        """Drop the records of earlier runs: nothing of what they did is in the table."""
        try:
            for path in self._session.list(FOLDER):
                self._session.delete_file(path)
        except OSError as error:
            logger.warning("records of earlier runs are still there: %s", first_line(error))

    def add(self, result: ShardResult) -> None:
        """Note a shard that has just arrived."""
        record = ShardRecord(
            run=self.run,
            at_s=round(time.monotonic() - self._began, 3),
            shard=result.shard.number,
            rows=result.num_rows,
            rejected=len(result.rejects),
            tokens=result.num_tokens,
            padded_tokens=result.padded_tokens,
            truncated=result.num_truncated,
            seconds={stage: round(spent, 4) for stage, spent in result.seconds.items()},
            worker=result.worker,
        )
        self._lines.append(json.dumps(asdict(record)) + "\n")

    def write_if_due(self) -> None:
        """Write if it is time to."""
        if time.monotonic() - self._written_at >= WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """Write what is new; where the store refuses, say so and keep it for the next time."""
        self._written_at = time.monotonic()
        if len(self._lines) == self._written:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "records.jsonl")
                file.write_text("".join(self._lines), encoding="utf-8")
                self._session.upload_file(str(file), f"{FOLDER}/{self.run}-{self._part:05d}.jsonl")
        except OSError as error:
            logger.warning("the records of this run are not written yet: %s", first_line(error))
            return
        self._written = len(self._lines)
        if self._written >= PART_RECORDS:
            self._lines.clear()
            self._part, self._written = self._part + 1, 0


def read_records(uri: str, storage_options: dict[str, str] | None = None) -> list[ShardRecord]:
    """Return the records of all runs that encoded for the table, by run, then by time."""
    session = LanceFileSession(uri, storage_options=storage_options)
    records: list[ShardRecord] = []
    for path in sorted(session.list(FOLDER)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "records.jsonl")
            session.download_file(path, str(file))
            lines = file.read_text(encoding="utf-8").splitlines()
            records += [ShardRecord(**json.loads(line)) for line in lines]
    return records


@dataclass(frozen=True)
class RunTotals:
    """Runs taken together.

    Attributes:
        runs: that encoded anything.
        seconds: from each run's start to its last shard, added up.
        tokens, padded_tokens, truncated: of all shards.
    """

    runs: int
    seconds: float
    tokens: int
    padded_tokens: int
    truncated: int

    @property
    def tokens_per_s(self) -> float:
        """Real tokens a second, over all workers."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of computed tokens that were padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


def totals(records: Sequence[ShardRecord]) -> RunTotals:
    """Add records up; a shard that was encoded twice counts twice, as it cost twice."""
    ends: dict[str, float] = {}
    for record in records:
        ends[record.run] = max(ends.get(record.run, 0.0), record.at_s)
    return RunTotals(
        len(ends),
        sum(ends.values()),
        sum(r.tokens for r in records),
        sum(r.padded_tokens for r in records),
        sum(r.truncated for r in records),
    )
