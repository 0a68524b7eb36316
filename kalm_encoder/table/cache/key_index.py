"""An index in memory: where the record of each key lies. It takes 16 bytes per record."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
GOLDEN = 0x9E3779B97F4A7C15
NOWHERE = 0
"""Place of a key that is not there."""


def record_keys(checksums: Words, ratio: int) -> Words:
    """Return the keys of rows with these checksums of their states at a stored ratio."""
    return checksums + np.uint64(ratio * GOLDEN % 2**64)


class KeyIndex:
    """Sorted runs of keys, each at least twice as long as the next, so that few are searched.

    A place is the number of a segment, from 1 on, times 2**32, plus an offset in it. What is added
    later under a key hides what was there. Merging two runs takes their size once more in memory.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[Words, Words]] = []

    def add(self, keys: Words, places: Words, alive: Collection[int]) -> None:
        """Add keys, and forget, where runs are merged, what lies in segments that are gone.

        Args:
            keys: Keys in any order; of equal ones the last counts.
            places: Place of each.
            alive: Numbers of the segments that are there.
        """
        order = np.argsort(keys[::-1], kind="stable")
        run = _first_of_each(keys[::-1][order], places[::-1][order])
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            run = _merged(run, self._runs.pop(), alive)
        self._runs.append(run)

    def find(self, keys: Words) -> Words:
        """Return the place of each key, or NOWHERE."""
        places = np.full(len(keys), NOWHERE, np.uint64)
        for run_keys, run_places in self._runs:  # the newest is the last
            if len(run_keys):
                at = np.minimum(np.searchsorted(run_keys, keys), len(run_keys) - 1)
                there = run_keys[at] == keys
                places[there] = run_places[at[there]]
        return places

    @property
    def nbytes(self) -> int:
        """Number of bytes held."""
        return sum(keys.nbytes + places.nbytes for keys, places in self._runs)


def _merged(
    newer: tuple[Words, Words], older: tuple[Words, Words], alive: Collection[int]
) -> tuple[Words, Words]:
    keys, places = (np.concatenate(pair) for pair in zip(newer, older, strict=True))
    order = np.argsort(keys, kind="stable")
    keys, places = _first_of_each(keys[order], places[order])
    kept = np.isin(places >> np.uint64(32), np.array([*alive], np.uint64))
    return keys[kept], places[kept]


def _first_of_each(keys: Words, places: Words) -> tuple[Words, Words]:
    first = np.append(True, keys[1:] != keys[:-1])[: len(keys)]
    return keys[first], places[first]
