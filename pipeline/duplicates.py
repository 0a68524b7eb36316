"""Ids that are in a table more than once, found in bounded memory.

The id column is scanned in passes; each pass looks only at the ids whose hash falls in its part,
so that at most about ROWS_PER_PASS rows of 32 bytes are held at a time, whatever the table's size.
Two ids count as the same if their 128-bit hashes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import xxhash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scan = Callable[[], Iterator[tuple[Sequence[str], NDArray[np.int64]]]]

ON_DUPLICATE = ("error", "first", "last")
ROWS_PER_PASS = 4_000_000


def repeated_rows(dataset: lance.LanceDataset, keep: str) -> Iterator[NDArray[np.int64]]:
    """Yield the stable row ids of all rows of a repeated id but the one to keep.

    Args:
        dataset: scanned in its order, which before compaction is that of the corpus.
        keep: "first" or "last".
    """

    def scan() -> Iterator[tuple[Sequence[str], NDArray[np.int64]]]:
        for batch in dataset.scanner(columns=["id"], with_row_id=True).to_batches():
            yield batch["id"].to_pylist(), batch["_rowid"].to_numpy().astype(np.int64)

    yield from repeated(scan, dataset.count_rows(), keep)


def repeated(
    scan: Scan, total: int, keep: str, rows_per_pass: int = ROWS_PER_PASS
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of all rows of a repeated id but the first or last.

    Args:
        scan: yields (ids, numbers of their rows) of the whole corpus, each time it is called.
        total: about how many rows there are.
        keep: "first" or "last".
        rows_per_pass: bounds the memory, 32 bytes a row.
    """
    passes = max(1, -(-total // rows_per_pass))
    for part in range(passes):
        high, low, numbers = _part(scan, part, passes)
        order = np.lexsort((np.arange(len(low)), low, high))
        high, low, numbers = high[order], low[order], numbers[order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        again = np.zeros(len(low), bool)
        # Equal hashes stand side by side in scan order: all but the first, or but the last.
        (again[1:] if keep == "first" else again[:-1])[same] = True
        if again.any():
            yield numbers[again]


def _part(
    scan: Scan, part: int, passes: int
) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.int64]]:
    """Return both halves of the id hashes of one part, and the numbers of their rows."""
    found: list[NDArray[np.uint64]] = [np.empty((0, 3), np.uint64)]
    for ids, numbers in scan():
        digests = b"".join(xxhash.xxh3_128_digest(i.encode()) for i in ids)
        hashes = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
        mine = hashes[:, 0] % np.uint64(passes) == part
        found.append(np.column_stack([hashes[mine], numbers[mine].astype(np.uint64)]))
    columns = np.concatenate(found)
    return columns[:, 0], columns[:, 1], columns[:, 2].astype(np.int64)
