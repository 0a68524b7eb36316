"""Shards that wait for a worker: in which order, after how many failures, and whose fault it was.

Knows no Ray. A shard that raises is tried again, at the end. A shard whose worker died is a
suspect: suspects are tried last and one at a time, so that none is blamed for its neighbour. A
shard whose node went away is no suspect: that is not its fault, and not counted.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from pipeline.corpus.inputs import COMPRESSIONS, is_columnar
from pipeline.corpus.shards import Shard
from pipeline.logs import in_shard
from pipeline.messages import ShardFailure

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


def short_last(shards: Sequence[Shard], count: int) -> tuple[list[Shard], list[Shard]]:
    """Return (shards in plan order, the `count` shortest from long to short).

    The second part goes last, so that workers finish together. Shards of compressed files all
    stay in the first: to enter one at its end is to decompress all of it.

    Args:
        shards: in plan order.
        count: about as many as the workers have at once.
    """
    movable = [s for s in shards if not s.path.endswith(COMPRESSIONS)]
    sizes = _sizes(movable)
    shortest = sorted(movable, key=lambda s: (sizes[s.number], -s.number))[:count]
    moved = {shard.number for shard in shortest}
    first = [shard for shard in shards if shard.number not in moved]
    return first, shortest[::-1]


def _sizes(shards: Iterable[Shard]) -> dict[int, float]:
    """Return by number the length over the median in the same unit: bytes of text, or rows."""
    units: dict[bool, list[Shard]] = {}
    for shard in shards:
        units.setdefault(is_columnar(shard.path), []).append(shard)
    sizes: dict[int, float] = {}
    for group in units.values():
        median = statistics.median(shard.rows.length for shard in group)
        sizes.update((shard.number, shard.rows.length / median) for shard in group)
    return sizes


@dataclass(frozen=True)
class _Suspect:
    shard: Shard
    node: str


class ShardQueue:
    """Shards not under way; `len` is how many may be taken now, suspects apart.

    A worker gets shard after shard of one file while it has any, then a file that nobody reads,
    then a part of the one with most left: a compressed file is decompressed and a Parquet row
    group decoded by as few workers as can be, and nobody waits for it.

    Args:
        shards: in plan order.
        last: after all those, in this order.
    """

    def __init__(self, shards: Iterable[Shard], last: Iterable[Shard] = ()) -> None:
        self._files: dict[str, deque[Shard]] = {}
        for shard in shards:
            self._files.setdefault(shard.path, deque()).append(shard)
        self._unread = deque(self._files)
        self._last = deque(last)
        self._suspects: deque[_Suspect] = deque()
        self._attempts: dict[int, int] = {}
        self._length = sum(map(len, self._files.values())) + len(self._last)

    def __len__(self) -> int:
        return self._length

    @property
    def num_suspects(self) -> int:
        """Shards that wait to be tried alone."""
        return len(self._suspects)

    def take(self, path: str) -> Shard:
        """Return the next shard for a worker whose last one was of the file `path`.

        Raises:
            IndexError: none waits.
        """
        if path not in self._files:
            if self._unread:
                path = self._unread.popleft()
            elif self._files:
                path = max(self._files, key=lambda name: len(self._files[name]))
        waiting = self._files.get(path, self._last)
        shard = waiting.popleft()
        if not waiting:
            self._files.pop(path, None)
        self._length -= 1
        return shard

    def take_suspect(self) -> Shard:
        """Return the next suspect, to be tried alone."""
        return self._suspects.popleft().shard

    def put_back(self, shard: Shard) -> None:
        """Take back a shard that was lost through no fault of its own."""
        self._last.appendleft(shard)
        self._length += 1

    def failed(self, shard: Shard, reason: str) -> list[ShardFailure]:
        """Take back a shard that raised; or give it up."""
        failures = self._count_attempt(shard, reason)
        if not failures:
            self._last.append(shard)
            self._length += 1
        return failures

    def suspect(self, shard: Shard, node: str, reason: str) -> list[ShardFailure]:
        """Take back a shard whose worker died on a node that lives; or give it up."""
        failures = self._count_attempt(shard, f"its worker died: {reason}")
        if not failures:
            self._suspects.append(_Suspect(shard, node))
        return failures

    def clear_suspects(self, nodes: Container[str]) -> None:
        """Clear suspects whose worker died a moment before its node did.

        Args:
            nodes: that are alive.
        """
        suspects, self._suspects = self._suspects, deque()
        for suspect in suspects:
            if suspect.node in nodes:
                self._suspects.append(suspect)
            else:
                self._attempts[suspect.shard.number] -= 1
                self.put_back(suspect.shard)

    def _count_attempt(self, shard: Shard, reason: str) -> list[ShardFailure]:
        attempts = self._attempts.get(shard.number, 0) + 1
        self._attempts[shard.number] = attempts
        if attempts >= MAX_ATTEMPTS:
            return [ShardFailure(shard, attempts, reason)]
        with in_shard(shard.id):
            logger.warning("shard %s failed (attempt %d): %s", shard.id, attempts, reason)
        return []
