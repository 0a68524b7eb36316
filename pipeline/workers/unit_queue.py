"""Units that wait for a worker: in which order, after how many failures, and whose fault it was.

Knows no Ray. A unit that raises is tried again at the end. A unit whose worker died is a suspect:
suspects are tried last and one at a time, so that no unit is blamed for its neighbour. A unit
whose node went away is no suspect: that is not its fault, and does not count as an attempt.
"""

from __future__ import annotations

import logging
import statistics
from collections import deque
from collections.abc import Container, Iterable, Sequence

from pipeline.logs import in_shard
from pipeline.messages import Failure, Unit

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3


def short_last(units: Sequence[Unit], count: int) -> tuple[list[Unit], list[Unit]]:
    """Return (units in plan order, the `count` shortest units from long to short).

    The second part goes last, so that workers finish together. Units of compressed files all
    stay in the first part: to enter a compressed file at its end is to decompress all of it.

    Args:
        units: Units in plan order.
        count: Number to move, about as many as the workers have at once.
    """
    movable = [s for s in units if not s.is_packed]
    lengths: dict[str, list[int]] = {}
    for unit in movable:
        lengths.setdefault(unit.measure, []).append(unit.size)
    # Lengths in bytes and in rows can be compared once each is divided by its median.
    median = {measure: statistics.median(found) for measure, found in lengths.items()}
    movable.sort(key=lambda s: (s.size / median[s.measure], -s.number))
    moved = {unit.number for unit in movable[:count]}
    return [unit for unit in units if unit.number not in moved], movable[:count][::-1]


class UnitQueue:
    """Units not under way; `len` is how many may be taken now, without the suspects.

    A worker gets unit after unit of one file while there are any, then a file that nobody reads,
    then part of the file with most left. So as few workers as possible decompress a file or decode
    a Parquet row group, and no worker waits for one.

    Args:
        units: Units in plan order.
        last: Units that go after all those, in this order.

    Attributes:
        suspects: Units to be tried alone, each with the node on which its worker died.
    """

    def __init__(self, units: Iterable[Unit], last: Iterable[Unit] = ()) -> None:
        self._files: dict[str, deque[Unit]] = {}
        for unit in units:
            self._files.setdefault(unit.path, deque()).append(unit)
        self._unread = deque(self._files)
        self._last = deque(last)
        self.suspects: deque[tuple[Unit, str]] = deque()
        self._attempts: dict[int, int] = {}
        self._length = sum(map(len, self._files.values())) + len(self._last)

    def __len__(self) -> int:
        return self._length

    def take(self, path: str) -> Unit:
        """Return the next unit for a worker whose last one came from the file `path`.

        Raises:
            IndexError: If no unit waits.
        """
        if path not in self._files:
            if self._unread:
                path = self._unread.popleft()
            elif self._files:
                path = max(self._files, key=lambda name: len(self._files[name]))
        waiting = self._files.get(path, self._last)
        unit = waiting.popleft()
        if not waiting:
            self._files.pop(path, None)
        self._length -= 1
        return unit

    def put_back(self, unit: Unit) -> None:
        """Take back a unit that was lost through no fault of its own."""
        self._last.appendleft(unit)
        self._length += 1

    def failed(self, unit: Unit, reason: str, node: str = "") -> list[Failure]:
        """Take back a unit that failed, or give it up after the last attempt.

        Args:
            unit: The unit.
            reason: What happened.
            node: The living node on which the unit's worker died, "" if the unit only raised.
        """
        attempts = self._attempts.get(unit.number, 0) + 1
        self._attempts[unit.number] = attempts
        if attempts >= MAX_ATTEMPTS:
            return [Failure(unit, attempts, reason)]
        with in_shard(unit.id):
            logger.warning("shard %s failed (attempt %d): %s", unit.id, attempts, reason)
        if node:
            self.suspects.append((unit, node))
        else:
            self._last.append(unit)
            self._length += 1
        return []

    def clear_suspects(self, nodes: Container[str]) -> None:
        """Clear the suspects whose worker died a moment before its node did.

        Args:
            nodes: Nodes that are alive.
        """
        suspects, self.suspects = self.suspects, deque()
        for unit, node in suspects:
            if node in nodes:
                self.suspects.append((unit, node))
            else:
                self._attempts[unit.number] -= 1
                self.put_back(unit)
