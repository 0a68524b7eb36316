"""Computes how fast the workers of a run are, and how long the rest will take; it has no clock.

The speed of a worker is that of its shards of the last minute, or of its last few where those took
longer. Start-up and earlier runs do not count: a worker's first shard counts from when the worker
began on it. The ETA is what is left, by size, over the speed of all workers.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.run.records import RunTotals, ShardRecord

WINDOW_S = 60.0
"""Seconds whose shards make up the speed of now: long enough to even out single shards."""
LEAST_SHARDS = 4
"""Shards that a worker's speed comes from, if it has so many, and that an ETA needs in all."""
MOST_SHARDS = 64
"""Shards remembered per worker. The window of a fast worker is therefore shorter than WINDOW_S."""
ERRORS = 3.0
"""Standard errors on each side of an ETA. Two would do after many shards; after a few, three make
an interval of about 95 %."""


@dataclass(frozen=True)
class Step:
    """The time from one shard of a worker to the next.

    Attributes:
        at_s: Time at which the shard arrived.
        took_s: Seconds since the worker's shard before.
        tokens: Real tokens of the shard.
        size: Size of the shard, in the unit in which the rest is measured.
    """

    at_s: float
    took_s: float
    tokens: int
    size: int


@dataclass(frozen=True)
class Eta:
    """Seconds until all is encoded, with an interval."""

    value: float
    low: float
    high: float


@dataclass
class WorkerSpeed:
    """One worker: what it has done, and how fast it is.

    Attributes:
        totals: All of its shards in this run.
        seen_at_s: Time at which the last one arrived.
    """

    totals: RunTotals = field(default_factory=RunTotals)
    seen_at_s: float = 0.0
    _steps: deque[Step] = field(default_factory=lambda: deque(maxlen=MOST_SHARDS))

    def add(self, shard: ShardRecord, size: int) -> None:
        """Count a shard that arrived at `shard.at_s`."""
        took_s = shard.at_s - self.seen_at_s if self._steps else shard.worked_s or shard.at_s
        self._steps.append(Step(shard.at_s, took_s, shard.tokens, size))
        self.totals.add(shard)
        self.totals.seconds += took_s
        self.seen_at_s = shard.at_s

    def recent(self, now_s: float) -> list[Step]:
        """Return the steps that tell today's speed.

        The time by which a worker is overdue is a step without tokens: a stalled run slows down.
        """
        steps = [step for step in self._steps if step.at_s > now_s - WINDOW_S]
        if len(steps) < LEAST_SHARDS:
            steps = list(self._steps)[-LEAST_SHARDS:]
        overdue_s = now_s - self.seen_at_s - 2 * statistics.fmean(step.took_s for step in steps)
        return [*steps, Step(now_s, overdue_s, 0, 0)] if overdue_s > 0 else steps

    def tokens_per_s(self, now_s: float) -> float:
        """Return the real tokens per second of late."""
        steps = self.recent(now_s)
        return sum(step.tokens for step in steps) / max(sum(step.took_s for step in steps), 1e-9)


def eta(workers: Iterable[WorkerSpeed], left: int, now_s: float) -> Eta | None:
    """Return how long the rest will take, or None until enough shards have arrived.

    The interval has two parts. One is the standard error of the mean time per size, of the shards
    seen and of those that are left. The other is the longest shard of late: one per worker is under
    way, and how far is not known. What follows the encoding (sealing, indexes) is not in it.

    Args:
        workers: All workers that have sent a shard.
        left: Size of all shards that have not arrived.
        now_s: Time now, on the clock of the steps.
    """
    if left <= 0:
        return Eta(0.0, 0.0, 0.0)
    recent = [worker.recent(now_s) for worker in workers]
    steps = [step for steps in recent for step in steps if step.size]
    if len(steps) < LEAST_SHARDS:
        return None
    speed = sum(
        sum(step.size for step in steps) / max(sum(step.took_s for step in steps), 1e-9)
        for steps in recent
    )
    value = left / speed
    per_size = [step.took_s / step.size for step in steps]
    spread = statistics.stdev(per_size) / max(statistics.fmean(per_size), 1e-9)
    shards_left = left / statistics.fmean(step.size for step in steps)
    off = ERRORS * spread * math.sqrt(1 / len(steps) + 1 / shards_left)
    longest = max(step.took_s for step in steps)
    return Eta(value, max(0.0, value * (1 - off) - longest), value * (1 + off) + longest)
