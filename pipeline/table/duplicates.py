"""Ids that are in a table more than once, found in bounded memory and one scan.

Only hashes of the ids are kept, and where there are more than ROWS_AT_ONCE they go to temporary
files, 24 bytes a row, each of which holds all rows whose hash falls in its part: so that at most
about ROWS_AT_ONCE rows of 64 bytes are in memory, whatever the table's size. Two ids count as the
same if their 128-bit hashes are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lance
import numpy as np
import xxhash

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Scan = Callable[[], Iterator[tuple[Sequence[str], NDArray[np.int64]]]]

ON_DUPLICATE = ("error", "first", "last")
ROWS_AT_ONCE = 2_000_000
MOST_PARTS = 512
"""Open files; beyond a billion rows the parts grow instead."""


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
    scan: Scan, total: int, keep: str, rows_at_once: int = ROWS_AT_ONCE
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of all rows of a repeated id but the first or last.

    Args:
        scan: yields (ids, numbers of their rows) of the whole corpus.
        total: about how many rows there are.
        keep: "first" or "last".
        rows_at_once: bounds the memory, 64 bytes a row.

    Raises:
        OSError: the temporary folder (TMPDIR) has no room for 24 bytes a row.
    """
    parts = min(MOST_PARTS, max(1, -(-total // rows_at_once)))
    for rows in _parted(scan, parts):
        high, low, numbers = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T  # a stable sort
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        again = np.zeros(len(low), bool)
        # Equal hashes stand side by side in scan order: all but the first, or but the last.
        (again[1:] if keep == "first" else again[:-1])[same] = True
        if again.any():
            yield numbers[again].astype(np.int64)


def _parted(scan: Scan, parts: int) -> Iterator[NDArray[np.uint64]]:
    """Yield the rows of each part, in scan order: both halves of the id's hash and the number."""
    if parts == 1:
        yield np.concatenate([np.empty((0, 3), np.uint64), *_hashed(scan)])
        return
    with tempfile.TemporaryDirectory(prefix="kalm-ids-") as folder:
        names = [Path(folder, str(part)) for part in range(parts)]
        with ExitStack() as stack:
            files: list[Any] = [stack.enter_context(name.open("wb")) for name in names]
            for rows in _hashed(scan):
                part = rows[:, 0] % np.uint64(parts)
                order = np.argsort(part, kind="stable")
                starts = np.searchsorted(part[order], np.arange(parts + 1))
                for i in np.flatnonzero(np.diff(starts)):
                    files[i].write(rows[order[starts[i] : starts[i + 1]]].tobytes())
        for name in names:
            yield np.fromfile(name, np.uint64).reshape(-1, 3)
            name.unlink()


def _hashed(scan: Scan) -> Iterator[NDArray[np.uint64]]:
    """Yield the batches of a scan as (n, 3) numbers: both halves of the id's hash, the row."""
    for ids, numbers in scan():
        digests = b"".join(xxhash.xxh3_128_digest(i.encode()) for i in ids)
        hashes = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
        yield np.column_stack([hashes, numbers.astype(np.uint64)])
