"""Shards that wait for a worker: in which order, after how many failures, and whose fault it was.

Knows no Ray. A shard that raises is tried again at the end. A shard whose worker died is a suspect:
suspects are tried last and one at a time, so that no shard is blamed for its neighbour. A shard
whose node went away is no suspect: that is not its fault, and does not count as an attempt.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Container, Iterable, Sequence

from pipeline.corpus.shards import Shard
from pipeline.logs import in_shard
from pipeline.messages import ShardFailure

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


def short_last(shards: Sequence[Shard], count: int) -> tuple[list[Shard], list[Shard]]:
    """Return (shards in plan order, the `count` shortest shards from long to short).

    The second part goes last, so that workers finish together. Shards of compressed files all
    stay in the first part: to enter a compressed file at its end is to decompress all of it.

    Args:
        shards: Shards in plan order.
        count: Number to move, about as many as the workers have at once.
    """
    movable = [s for s in shards if not s.file.is_packed]
    lengths: dict[bool, list[int]] = {}
    for shard in movable:
        lengths.setdefault(shard.file.is_columnar, []).append(shard.rows.length)
    # Lengths in bytes and in rows can be compared once each is divided by its median.
    median = {unit: statistics.median(found) for unit, found in lengths.items()}
    movable.sort(key=lambda s: (s.rows.length / median[s.file.is_columnar], -s.number))
    moved = {shard.number for shard in movable[:count]}
    return [shard for shard in shards if shard.number not in moved], movable[:count][::-1]


class ShardQueue:
    """Shards not under way; `len` is how many may be taken now, without the suspects.

    A worker gets shard after shard of one file while there are any, then a file that nobody reads,
    then part of the file with most left. So as few workers as possible decompress a file or decode
    a Parquet row group, and no worker waits for one.

    Args:
        shards: Shards in plan order.
        last: Shards that go after all those, in this order.

    Attributes:
        suspects: Shards to be tried alone, each with the node on which its worker died.
    """

    def __init__(self, shards: Iterable[Shard], last: Iterable[Shard] = ()) -> None:
        self._files: dict[str, deque[Shard]] = {}
        for shard in shards:
            self._files.setdefault(shard.path, deque()).append(shard)
        self._unread = deque(self._files)
        self._last = deque(last)
        self.suspects: deque[tuple[Shard, str]] = deque()
        self._attempts: dict[int, int] = {}
        self._length = sum(map(len, self._files.values())) + len(self._last)

    def __len__(self) -> int:
        return self._length

    def take(self, path: str) -> Shard:
        """Return the next shard for a worker whose last one came from the file `path`.

        Raises:
            IndexError: If no shard waits.
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

    def put_back(self, shard: Shard) -> None:
        """Take back a shard that was lost through no fault of its own."""
        self._last.appendleft(shard)
        self._length += 1

    def failed(self, shard: Shard, reason: str, node: str = "") -> list[ShardFailure]:
        """Take back a shard that failed, or give it up after the last attempt.

        Args:
            shard: The shard.
            reason: What happened.
            node: The living node on which the shard's worker died, "" if the shard only raised.
        """
        attempts = self._attempts.get(shard.number, 0) + 1
        self._attempts[shard.number] = attempts
        if attempts >= MAX_ATTEMPTS:
            return [ShardFailure(shard, attempts, reason)]
        with in_shard(shard.id):
            logger.warning("shard %s failed (attempt %d): %s", shard.id, attempts, reason)
        if node:
            self.suspects.append((shard, node))
        else:
            self._last.append(shard)
            self._length += 1
        return []

    def clear_suspects(self, nodes: Container[str]) -> None:
        """Clear the suspects whose worker died a moment before its node did.

        Args:
            nodes: Nodes that are alive.
        """
        suspects, self.suspects = self.suspects, deque()
        for shard, node in suspects:
            if node in nodes:
                self.suspects.append((shard, node))
            else:
                self._attempts[shard.number] -= 1
                self.put_back(shard)
