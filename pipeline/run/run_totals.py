"""Shards added up: the one place that says what a speed and a padding are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipeline.run.records import ShardRecord

DEVICE = ("forward", "pool")
"""Stages in which the device computes."""


@dataclass
class Work:
    """What was encoded in some time.

    Attributes:
        seconds: by the clock.
        shards, rows, rejected, tokens, padded_tokens, truncated: sums.
        stages: seconds of the workers by stage.
    """

    seconds: float = 0.0
    shards: int = 0
    rows: int = 0
    rejected: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    truncated: int = 0
    stages: dict[str, float] = field(default_factory=dict)

    def add(self, shard: ShardRecord) -> None:
        """Count a shard; `seconds` are the caller's."""
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
        """Real tokens a second, over all workers."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def padding(self) -> float:
        """Share of computed tokens that were padding."""
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0

    @property
    def device_busy(self) -> float:
        """Share of the time in which the device computed; of one worker."""
        spent = sum(self.stages.get(stage, 0.0) for stage in DEVICE)
        return min(1.0, spent / self.seconds) if self.seconds else 0.0


@dataclass
class RunTotals(Work):
    """Runs taken together; `seconds` are from each run's start to its last shard, added up."""

    runs: int = 0


def totals(records: Sequence[ShardRecord]) -> RunTotals:
    """Add records up; a shard that was encoded twice counts twice, as it cost twice."""
    ends: dict[str, float] = {}
    found = RunTotals()
    for record in records:
        found.add(record)
        ends[record.run] = max(ends.get(record.run, 0.0), record.at_s)
    found.runs, found.seconds = len(ends), sum(ends.values())
    return found
