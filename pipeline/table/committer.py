"""When to commit: rarely enough to cost little, often enough that a crash repeats little.

A commit writes a manifest that lists every fragment, so it costs more the more shards the table
has (measured: 10 ms at 1,000, 1 s at 100,000). The pause between two therefore grows with what
the last one took.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.messages import ShardResult
    from pipeline.table.ledger import Ledger

COMMIT_SHARE = 0.04
"""Of the time of a run that commits may take."""
LONGEST_PAUSE_S = 300.0
MOST_WAITING = 4096
"""Shards; about 2 kB of metadata each."""


def pause_s(every_s: float, last_s: float) -> float:
    """Return how long to wait after a commit before the next one.

    `every_s`, or longer where the last commit took long: then so long that commits take at most
    COMMIT_SHARE of the time, but no more than LONGEST_PAUSE_S for that reason. A pause of 0 commits
    each shard by itself. Example: every 10 s, and every 25 s once a commit takes 1 s.

    Args:
        every_s: what the user asked for.
        last_s: seconds the last commit took.
    """
    return max(every_s, min(last_s / COMMIT_SHARE, LONGEST_PAUSE_S)) if every_s else 0.0


@dataclass
class Committer:
    """Written shards that wait for the next commit.

    A driver that is killed repeats what waits: what all workers finish in one pause, at most
    MOST_WAITING shards.

    Attributes:
        ledger: that commits.
        every_s: least seconds between two commits.
        tell: called after each commit with the results, its seconds and the table's version.
        clock: seconds, from any start.
        waiting: results to commit.
    """

    ledger: Ledger
    every_s: float
    tell: Callable[[Sequence[ShardResult], float, int], None] | None = None
    clock: Callable[[], float] = time.monotonic
    waiting: list[ShardResult] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._due = self.clock() + self.every_s

    def add(self, result: ShardResult) -> None:
        """Let a shard wait; its rejects are kept elsewhere already."""
        self.waiting.append(replace(result, rejects=()))

    def commit_if_due(self) -> bool:
        """Commit if it is time to, or too many wait. Returns whether it did."""
        if self.clock() >= self._due or len(self.waiting) >= MOST_WAITING:
            return self.commit()
        return False

    def commit(self) -> bool:
        """Commit whatever waits. Returns whether anything did."""
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
