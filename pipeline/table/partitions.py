"""Hash partitions: rows that many workers write, and that each partition's worker reads again.

All rows with one hash are in one partition, whoever wrote them. A writer sorts its rows by
partition and writes one Lance file; a footer entry says where each partition begins. A reader reads
one partition of all files. So no process holds more than its share of the rows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import xxhash
from lance.file import LanceFileReader, LanceFileWriter
from numpy.typing import NDArray

from kalm_encoder.table.location import Location

PARTITION_ROWS = 1_000_000
"""About how many rows one partition has, so that a join takes some 100 MB."""
STARTS = "kalm.starts"
"""Metadata key of a file: the first row of each partition, and the number of rows."""
HIGH, LOW = "hash_high", "hash_low"
"""Columns of the two halves of a 128-bit hash. The high half chooses the partition."""
ROW = "row"
"""Column of row addresses: the id of the fragment in the high 32 bits, the offset in the low."""


def num_partitions(num_rows: int) -> int:
    """Return how many partitions that many rows are worth."""
    return max(1, -(-num_rows // PARTITION_ROWS))


def new_name() -> str:
    """Return a name of its own for a file: two workers may do the same part at once."""
    return f"{uuid.uuid4().hex}.lance"


def hashes_of(values: Sequence[str]) -> dict[str, NDArray[np.uint64]]:
    """Return both halves of the XXH3 hash of each value, by the names of their columns."""
    digests = b"".join(xxhash.xxh3_128_digest(value.encode()) for value in values)
    halves = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    return {HIGH: halves[:, 0].copy(), LOW: halves[:, 1].copy()}


def write_partitions(rows: pa.Table, partitions: int, file: Location) -> None:
    """Write rows so that each partition can be read by itself; their order within it stays.

    Args:
        rows: Any columns, with HIGH among them (uint64).
        partitions: Number of partitions.
        file: File to write, in place of what is there.

    Raises:
        OSError: If the store refuses.
    """
    chosen = rows[HIGH].to_numpy() % np.uint64(partitions)
    write_groups(rows, chosen.astype(np.int64), partitions, file)


def write_groups(rows: pa.Table, groups: NDArray[np.int64], count: int, file: Location) -> None:
    """Write rows so that `read_partition` finds each group; their order within it stays.

    Args:
        rows: Any columns.
        groups: (rows,) the group of each row, below `count`.
        count: Number of groups.
        file: File to write, in place of what is there.

    Raises:
        OSError: If the store refuses.
    """
    starts = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=count))])
    rows = rows.take(pa.array(np.argsort(groups, kind="stable"))).combine_chunks()
    with LanceFileWriter(file.uri, rows.schema, storage_options=file.options) as writer:
        writer.add_schema_metadata(STARTS, json.dumps(starts.tolist()))
        writer.write_batch(rows)


def read_partition(files: Sequence[Location], number: int) -> Iterator[pa.Table]:
    """Yield the rows of one partition from each file, in the order of the files.

    Raises:
        OSError: If a file cannot be read.
    """
    for file in files:
        reader = LanceFileReader(file.uri, storage_options=file.options)
        metadata = reader.metadata().schema.metadata
        begin, end = json.loads(metadata[STARTS.encode()])[number : number + 2]
        if end > begin:
            yield reader.read_range(begin, end - begin, batch_size=end - begin).to_table()


def repeated_in(tables: Iterable[pa.Table], row: str, keep: str) -> NDArray[np.uint64]:
    """Return (n, 3) hash halves and number of all rows with a repeated hash, except one of each.

    Args:
        tables: Rows of one partition, with HIGH and LOW.
        row: Column of the numbers of the rows, in the order of the table (uint64).
        keep: Which row of a hash is left out: the "first" or the "last" in that order.
    """
    found = list(tables)
    if not found:
        return np.empty((0, 3), np.uint64)
    rows = pa.concat_tables(found)
    columns = np.column_stack([rows[name].to_numpy() for name in (HIGH, LOW, row)])
    columns = columns[np.lexsort((columns[:, 2], columns[:, 1], columns[:, 0]))]
    same = (columns[1:, :2] == columns[:-1, :2]).all(axis=1)
    again = np.zeros(len(columns), bool)
    # Equal hashes are neighbours in table order: mark all but the first, or all but the last.
    (again[1:] if keep == "first" else again[:-1])[same] = True
    return columns[again]
