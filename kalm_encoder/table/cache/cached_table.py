"""Looks up, adds and drops the states that a disk cache keeps of one table."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from kalm_encoder.table.cache.folder import CacheFolder
from kalm_encoder.table.cache.key_index import KeyIndex, Words
from kalm_encoder.table.cache.segments import SegmentWriter, read_entries, read_states

logger = logging.getLogger(__name__)

RESCAN_S = 10.0
"""Seconds after which a process looks for segments that others have written or removed."""
TOUCH_S = 10.0
"""Seconds after which the use of a segment is noted again."""
RETRY_S = 60.0
"""Seconds for which nothing is added to a cache that could not be written."""
DAMAGED = 1
"""Number in place of a segment's, for records that are not what was written."""


class CachedTable:
    """What is kept of one table, for all of its versions. Threads may share it.

    Args:
        folder: Folder of the cache.
        uri: Address of the table.
        segment_bytes: Most bytes of a segment.
        max_bytes: Most bytes of all files in the folder.

    Attributes:
        hits: Number of rows that were found.
        misses: Number of rows that were not.
    """

    def __init__(
        self, folder: CacheFolder, uri: str, *, segment_bytes: int, max_bytes: int
    ) -> None:
        self.hits = self.misses = 0
        self._folder = folder
        self._segment_bytes, self._max_bytes = segment_bytes, max_bytes
        self._name = xxhash.xxh3_64_hexdigest(uri.rstrip("/").encode())
        self._index = KeyIndex()
        self._segments: dict[int, _Known] = {}
        self._numbers: dict[Path, int] = {}
        self._last_number = DAMAGED
        self._next_scan = self._next_write = 0.0
        self._writers: list[SegmentWriter] = []  # one or none; the finaliser sees the list
        self._state = ""
        self._lock = threading.Lock()
        weakref.finalize(self, _finish, self._writers, os.getpid())

    def adopt(self, state: str) -> None:
        """Drop what was kept before the erasures that a version of the table has seen.

        If the folder cannot be written, the log says so. Nothing is added to it then, as it does
        not hold the name of these erasures.
        """
        try:
            self._folder.adopt(self._name, state)
        except OSError as error:
            logger.warning(
                "the disk cache %s cannot be written (%s): nothing is added to it, and if rows "
                "were erased, they may still be there. Make it writable or remove it.",
                *(self._folder.path, error),
            )
        with self._lock:
            self._scan()

    def get(self, keys: Words, sizes: Sequence[int]) -> list[memoryview | None]:
        """Return the states kept under keys, or None for those that are not there or damaged.

        Args:
            keys: Keys as `record_keys` returns them.
            sizes: Number of bytes of the states of each.
        """
        found: list[memoryview | None] = [None] * len(keys)
        with self._lock:
            if time.monotonic() >= self._next_scan:
                self._scan()
            located = self._locate(keys)
        for known, asked in located:
            try:
                self._read(known, asked, keys, sizes, found)
            except OSError:  # removed by another process, or the disk fails
                with self._lock:
                    self._forget(known.path)
        damaged = [i for _, asked in located for i, _ in asked if found[i] is None]
        hits = sum(states is not None for states in found)
        with self._lock:
            self.hits += hits
            self.misses += len(found) - hits
            if damaged:
                places = np.full(len(damaged), DAMAGED << 32, np.uint64)
                self._add(keys[damaged], places)
        return found

    def put(self, keys: Words, states: Sequence[memoryview], state: str) -> None:
        """Keep states, unless they are there already or the folder cannot be written.

        Args:
            keys: Keys as `record_keys` returns them.
            states: Bytes of each.
            state: Erasures that the version which they are from has seen.
        """
        with self._lock:
            if time.monotonic() < self._next_write:
                return
            there = {i for _, asked in self._locate(keys) for i, _ in asked}
            left = [(int(keys[i]), states[i]) for i in range(len(keys)) if i not in there]
            try:
                while left:
                    left = self._append(left, state)
            except OSError as error:
                self._writers.clear()
                self._next_write = time.monotonic() + RETRY_S
                logger.warning(
                    "the disk cache %s cannot be written (%s): nothing is added to it for %d s",
                    *(self._folder.path, error, RETRY_S),
                )

    def _append(
        self, records: list[tuple[int, memoryview]], state: str
    ) -> list[tuple[int, memoryview]]:
        """Write the first of the records, and return those that are left."""
        sizes = [states.nbytes for _, states in records]
        count = 0
        if self._writers and self._state == state:
            count = self._writers[0].count_fitting(sizes)
        if not count:
            writer = self._folder.begin(self._name, state, self._segment_bytes, self._max_bytes)
            if writer is None:  # these states are of a version that an erasure has replaced
                return []
            _finish(self._writers, os.getpid())
            self._writers[:], self._state = [writer], state
            if not (count := writer.count_fitting(sizes)):
                return records[1:]  # it is larger than a segment
        try:
            entries = self._writers[0].append(records[:count])
        except FileNotFoundError:  # removed by another process, to make room
            self._writers.clear()
            return records
        known = self._know(self._writers[0].path)
        self._add_entries(known, entries)
        known.end = self._writers[0].end
        return records[count:]

    def _locate(self, keys: Words) -> list[tuple[_Known, list[tuple[int, int]]]]:
        """Return the segments that hold keys, each with the numbers of the keys and offsets."""
        asked: dict[int, list[tuple[int, int]]] = {}
        for i, place in enumerate(self._index.find(keys).tolist()):
            asked.setdefault(place >> 32, []).append((i, place & 0xFFFFFFFF))
        return [(self._segments[n], found) for n, found in asked.items() if n in self._segments]

    def _read(
        self,
        known: _Known,
        asked: list[tuple[int, int]],
        keys: Words,
        sizes: Sequence[int],
        found: list[memoryview | None],
    ) -> None:
        fd = os.open(known.path, os.O_RDONLY)
        try:
            for i, offset in asked:
                found[i] = read_states(fd, offset, int(keys[i]), sizes[i])
            if (now := time.monotonic()) >= known.next_touch:
                known.next_touch = now + TOUCH_S
                os.utime(fd)
        finally:
            os.close(fd)

    def _scan(self) -> None:
        """Look for what other processes have added or removed."""
        self._next_scan = time.monotonic() + RESCAN_S
        try:
            there = [file.path for file in self._folder.segments(self._name)]
        except OSError:
            there = []
        for path in self._numbers.keys() - there:
            self._forget(path)
        # Names are in the order of time: what was kept anew hides what is damaged.
        for path in sorted(there):
            known = self._know(path)
            if known.end is not None:
                try:
                    entries, known.end = read_entries(path, known.end)
                except OSError:
                    self._forget(path)
                else:
                    self._add_entries(known, entries)

    def _know(self, path: Path) -> _Known:
        if path not in self._numbers:
            self._last_number += 1
            self._numbers[path] = self._last_number
            self._segments[self._last_number] = _Known(path, self._last_number)
        return self._segments[self._numbers[path]]

    def _forget(self, path: Path) -> None:
        if (number := self._numbers.pop(path, None)) is not None:
            del self._segments[number]

    def _add_entries(self, known: _Known, entries: NDArray[Any]) -> None:
        places = entries["offset"] + np.uint64(known.number << 32)
        self._add(entries["key"].astype(np.uint64), places)

    def _add(self, keys: Words, places: Words) -> None:
        if len(keys):
            self._index.add(keys, places, [DAMAGED, *self._segments])


@dataclass
class _Known:
    """A segment that this process knows.

    Attributes:
        path: The file.
        number: Its number here, in the places of the index.
        end: Offset up to which its records are in the index; None once it is finished.
        next_touch: When its use is noted again.
    """

    path: Path
    number: int
    end: int | None = 0
    next_touch: float = 0.0


def _finish(writers: list[SegmentWriter], owner: int) -> None:
    """Finish what is written, so that other processes read it quickly and its room is free."""
    while writers and os.getpid() == owner:  # a fork has a copy of the list
        with suppress(OSError):  # whatever is not finished is read record by record
            writers.pop().finish()
