"""Ids that occur in a table more than once, found in bounded memory.

Only hashes of the ids are kept. They go to temporary files, 24 bytes per row. All rows whose ids
have the same hash are in the same file, and one file is examined at a time, so that about
ROWS_AT_ONCE rows of 64 bytes are in memory, however large the table is.
Two ids count as the same if their 128-bit hashes are equal.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lance
import numpy as np
import xxhash
from numpy.typing import NDArray

Scan = Callable[[], Iterator[tuple[Sequence[str], NDArray[np.int64]]]]
"""Yields the ids of all rows in order, in batches, each with the numbers of its rows."""
DUPLICATE_POLICIES = ("error", "first", "last")
ROWS_AT_ONCE = 2_000_000
"""Rows of which the hashes are in memory at the same time."""
MOST_FILES = 512
"""Most temporary files that are open at once. Beyond a billion rows each file grows instead."""


def repeated_rows(dataset: lance.LanceDataset, keep: str) -> Iterator[NDArray[np.int64]]:
    """Yield the stable row ids of all rows with a repeated id, except the one row to keep.

    Args:
        dataset: Scanned in its own order, which before compaction is that of the corpus.
        keep: "first" or "last".
    """

    def scan() -> Iterator[tuple[Sequence[str], NDArray[np.int64]]]:
        for batch in dataset.scanner(columns=["id"], with_row_id=True).to_batches():
            yield batch["id"].to_pylist(), batch["_rowid"].to_numpy().astype(np.int64)

    yield from repeated(scan, dataset.count_rows(), keep)


def repeated(
    scan: Scan, total: int, keep: str, rows_at_once: int = ROWS_AT_ONCE
) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of all rows with a repeated id, except the first or last of each id.

    Args:
        scan: Reads all rows; see `Scan`.
        total: About how many rows there are.
        keep: "first" or "last".
        rows_at_once: Rows to hold in memory at the same time, 64 bytes per row.

    Raises:
        OSError: If the temporary folder (TMPDIR) has no room for 24 bytes per row.
    """
    num_files = min(MOST_FILES, max(1, -(-total // rows_at_once)))
    for rows in _by_hash(scan, num_files):
        high, low, numbers = rows[np.lexsort((rows[:, 1], rows[:, 0]))].T  # a stable sort
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
        again = np.zeros(len(low), bool)
        # Equal hashes are neighbours in scan order: mark all but the first, or all but the last.
        (again[1:] if keep == "first" else again[:-1])[same] = True
        if again.any():
            yield numbers[again].astype(np.int64)


def _by_hash(scan: Scan, num_files: int) -> Iterator[NDArray[np.uint64]]:
    """Yield rows (n, 3) in scan order such that all rows of one id are in the same array."""
    with tempfile.TemporaryDirectory(prefix="kalm-ids-") as folder:
        paths = [Path(folder, str(number)) for number in range(num_files)]
        with ExitStack() as stack:
            files: list[Any] = [stack.enter_context(path.open("wb")) for path in paths]
            for rows in _hashed(scan):
                chosen = rows[:, 0] % np.uint64(num_files)
                for number, file in enumerate(files):
                    file.write(rows[chosen == number].tobytes())
        for path in paths:
            yield np.fromfile(path, np.uint64).reshape(-1, 3)
            path.unlink()


def _hashed(scan: Scan) -> Iterator[NDArray[np.uint64]]:
    """Yield the batches of a scan as (n, 3): both halves of the id's hash, and the row's number."""
    for ids, numbers in scan():
        digests = b"".join(xxhash.xxh3_128_digest(i.encode()) for i in ids)
        hashes = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
        yield np.column_stack([hashes, numbers.astype(np.uint64)])
