"""When to commit: rarely enough to cost little, often enough that a crash repeats little work.

A commit writes a manifest that lists every fragment, so it costs more the more shards the table
has (measured: 10 ms at 1,000 shards, 1 s at 100,000). The pause between two commits therefore grows
with the time that the last one took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.messages import ShardResult
from pipeline.table.ledger import Ledger

COMMIT_SHARE = 0.04
"""Largest share of a run's time that commits may take."""
LONGEST_PAUSE_S = 300.0
"""Longest pause that is made only because commits are slow. It limits what a crash repeats."""
MOST_WAITING = 4096
"""Most shards that wait for a commit. Each holds about 2 kB of metadata in memory."""


def pause_s(every_s: float, last_s: float) -> float:
    """Return how many seconds to wait after one commit before the next.

    The pause is `every_s`, or longer if the last commit was slow: then commits take at most
    COMMIT_SHARE of the time, but the pause does not exceed LONGEST_PAUSE_S for that reason. For
    example, `every_s` of 10 gives 10 s, and 25 s once a commit takes 1 s.

    Args:
        every_s: Seconds that the user asked for; 0 commits each shard by itself.
        last_s: Seconds that the last commit took.
    """
    return max(every_s, min(last_s / COMMIT_SHARE, LONGEST_PAUSE_S)) if every_s else 0.0


@dataclass
class Committer:
    """Written shards that wait for the next commit.

    A driver that is killed repeats the waiting shards: those that all workers finish in one pause,
    and never more than MOST_WAITING.

    Attributes:
        ledger: Commits the shards.
        every_s: Least number of seconds between two commits.
        tell: Called after each commit with the results, the seconds it took and the new version.
        clock: Returns seconds since any fixed moment.
        waiting: Results to commit.
    """

    ledger: Ledger
    every_s: float
    tell: Callable[[Sequence[ShardResult], float, int], None] | None = None
    clock: Callable[[], float] = time.monotonic
    waiting: list[ShardResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due = self.clock() + self.every_s

    def add(self, result: ShardResult) -> None:
        """Let a shard wait, without its rejects, which are stored elsewhere already."""
        self.waiting.append(replace(result, rejects=()))

    def commit_if_due(self) -> bool:
        """Commit if it is time to or too many shards wait, and return whether it did."""
        if self.clock() >= self._due or len(self.waiting) >= MOST_WAITING:
            return self.commit()
        return False

    def commit(self) -> bool:
        """Commit all waiting shards and return whether there were any."""
        began = self.clock()
        results, took = self.waiting, 0.0
        if results:
            self.ledger.commit(results)
            took = self.clock() - began
            self.waiting = []
            if self.tell:
                self.tell(results, took, int(self.ledger.dataset.version))
        self._due = began + took + pause_s(self.every_s, took)
        return bool(results)
