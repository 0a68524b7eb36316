"""Cuts the rows of one version of a table into ranges of about equal bytes, and reads such a range.

Workers read them, so a range begins and ends with a fragment where it can: each page is then read
once. Rows are counted as a scan counts them: in the order of the table, without deleted ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import lance
import pyarrow as pa

BATCH_ROWS = 1024
"""Rows of a range that are in memory at the same time."""


class Piece(NamedTuple):
    """The rows of a range that are in one fragment.

    Attributes:
        fragment: The fragment.
        start: First of the rows in the fragment, from 0.
        num_rows: Number of rows.
    """

    fragment: lance.LanceFragment
    start: int
    num_rows: int


class TableRows:
    """The rows of one version of a table, by their number.

    Args:
        dataset: That version.
    """

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self._dataset = dataset
        self._fragments: list[lance.LanceFragment] = dataset.get_fragments()
        counts = (fragment.count_rows() for fragment in self._fragments)
        self._bounds: list[int] = list(accumulate(counts, initial=0))

    def __len__(self) -> int:
        return self._bounds[-1]

    def num_bytes(self) -> int:
        """Return the bytes of all data files."""
        return sum(map(_bytes_of, self._fragments))

    def cut(self, most_bytes: float, most_rows: int) -> list[tuple[int, int]]:
        """Cut all rows into ranges; return the first row of each and how many it has.

        Args:
            most_bytes: Bytes of a range, about. Small fragments share a range, and large ones are
                cut evenly.
            most_rows: Most rows of a range.
        """
        ranges: list[tuple[int, int]] = []
        begin = taken = 0
        for fragment, (start, end) in zip(self._fragments, pairwise(self._bounds), strict=True):
            size = _bytes_of(fragment)
            pieces = max(1, -(-(end - start) // most_rows), int(-(-size // most_bytes)))
            if begin < start and (taken + size > most_bytes or end - begin > most_rows):
                ranges.append((begin, start - begin))
                begin, taken = start, 0
            taken += size
            if pieces > 1:
                edges = [start + (end - start) * i // pieces for i in range(pieces + 1)]
                ranges += [(a, b - a) for a, b in pairwise(edges) if a < b]
                begin, taken = end, 0
        if begin < len(self):
            ranges.append((begin, len(self) - begin))
        return ranges

    def pieces(self, start: int, num_rows: int) -> Iterator[Piece]:
        """Yield the parts of a range, fragment by fragment."""
        end, i = start + num_rows, bisect_right(self._bounds, start) - 1
        while start < end:
            stop = min(end, self._bounds[i + 1])
            if start < stop:
                yield Piece(self._fragments[i], start - self._bounds[i], stop - start)
            start, i = stop, i + 1

    def batches(
        self, start: int, num_rows: int, columns: Sequence[str]
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a range in order, at most BATCH_ROWS at a time."""
        pieces = list(self.pieces(start, num_rows))
        yield from self._dataset.scanner(
            columns=list(columns),
            fragments=[piece.fragment for piece in pieces],
            offset=pieces[0].start,
            limit=num_rows,
            batch_size=BATCH_ROWS,
        ).to_batches()


def _bytes_of(fragment: lance.LanceFragment) -> int:
    return sum(int(file.file_size_bytes or 0) for file in fragment.metadata.files)
