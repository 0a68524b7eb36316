"""Records of what each run did, shards and commits, and their totals.

They lie as JSON lines beside the rows, in `<table>/_kalm/runs/<run>-<part>.jsonl`. A line with
`"kind": "commit"` is a commit, see `Progress.committed`; all others are shards. They are for people
and figures: no job reads them. `run_files` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field

from kalm_encoder.table.location import Location
from pipeline.table.side_files import RUNS, read_text

WAITING = ("wait", "queued", "idle")
"""Stages in which a worker did nothing for the shard. "wait" is what "queued" was called before."""
DEVICE = ("forward", "pool")
"""Stages in which the device computes."""


@dataclass(frozen=True)
class ShardRecord:
    """One encoded shard.

    Attributes:
        run: Id of the run: its start in UTC and a random name.
        at_s: Seconds from the start of the run to the shard's arrival at the driver.
        shard: Number of the shard in the plan.
        rows: Number of rows written.
        rejected: Number of rows that were rejected.
        tokens: Number of real tokens encoded.
        padded_tokens: Number of tokens computed, padding included.
        truncated: Number of passages cut to max_length.
        seconds: Seconds by stage.
        worker: Host and process of the worker, or "".
        waited_s: Seconds from the arrival to the commit that holds the shard. None if no commit
            holds it, and in records that are older than this field.
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
        """Seconds that the worker spent in its stages, waiting left out."""
        return sum(spent for stage, spent in self.seconds.items() if stage not in WAITING)


@dataclass
class RunTotals:
    """Shards added up: the one place that says what a speed and a padding are.

    Attributes:
        runs: Number of runs that encoded them.
        seconds: Time by the clock that encoding them took, over all runs.
        shards: Number of shards.
        rows: Number of rows written.
        rejected: Number of rows rejected.
        tokens: Number of real tokens.
        padded_tokens: Number of tokens computed, padding included.
        truncated: Number of passages cut to max_length.
        stages: Seconds of the workers by stage.
    """

    runs: int = 0
    seconds: float = 0.0
    shards: int = 0
    rows: int = 0
    rejected: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    truncated: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, shard: ShardRecord) -> None:
        """Count a shard; the caller keeps `runs` and `seconds`."""
        self.shards += 1
        self.rows += shard.rows
        self.rejected += shard.rejected
        self.tokens += shard.tokens
        self.padded_tokens += shard.padded_tokens
        self.truncated += shard.truncated
        for stage, spent in shard.seconds.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + spent

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per second, all workers together."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of the computed tokens that were padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def device_busy(self) -> float:
        """Share of the time in which the device computed; meaningful for one worker."""
        spent = sum(self.stages.get(stage, 0.0) for stage in DEVICE)
        return min(1.0, spent / self.seconds) if self.seconds else 0.0


def totals(records: Iterable[ShardRecord]) -> RunTotals:
    """Add records up. A shard that was encoded twice counts twice, because it cost twice.

    The seconds are those from each run's start to its last shard.
    """
    found = RunTotals()
    ends: dict[str, float] = {}
    for record in records:
        found.add(record)
        ends[record.run] = max(ends.get(record.run, 0.0), record.at_s)
    found.runs, found.seconds = len(ends), sum(ends.values())
    return found


def read_records(table: Location) -> list[ShardRecord]:
    """Return the shards of all runs that encoded for the table, by run, then by time."""
    session = table.file_session()
    texts = [read_text(session, path) for path in sorted(session.list(RUNS))]
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    return [ShardRecord(**line) for line in lines if "kind" not in line]
