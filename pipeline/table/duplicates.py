"""Ids that occur in a table more than once, found by the workers.

Each part of the table is read once and the hashes of its ids are written to partitions, 24 bytes
per row. Rows with the same id are in the same partition, and one worker examines one partition at a
time, so no process holds more than about a million rows, however large the table is.
Two ids count as the same if their 128-bit hashes are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import nsmallest
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from kalm_encoder.table.location import Location
from pipeline.messages import Part, Place
from pipeline.table.deletions import write_addresses
from pipeline.table.fragments import fragment_groups
from pipeline.table.partitions import (
    HIGH,
    LOW,
    ROW,
    hashes_of,
    new_name,
    num_partitions,
    read_partition,
    repeated_in,
    write_partitions,
)
from pipeline.table.steps import DoPart, Steps, StepWork, VersionWork

DUPLICATE_POLICIES = ("error", "first", "last")
GROUP_ROWS = 1_000_000
"""About how many rows one part reads; their hashes take 24 MB."""
SHOWN = 100
"""Most repeated rows that are named."""


@dataclass(frozen=True)
class Repeated:
    """The rows with a repeated id, except the one row of each id that is kept.

    Attributes:
        count: Number of these rows.
        shown: Addresses of at most SHOWN of them, in the order of the hashes of their ids.
        files: Files that hold the addresses of all of them, by group of fragments.
        groups: Numbers of the groups that hold any.
    """

    count: int
    shown: tuple[int, ...]
    files: tuple[Location, ...]
    groups: tuple[int, ...]


def find_repeated(
    steps: Steps, table: Location, dataset: lance.LanceDataset, keep: str, folder: Location
) -> Repeated:
    """Find all rows with a repeated id, except the one row of each id that is kept.

    Args:
        steps: How the parts are done.
        table: Address of the table.
        dataset: The version to examine. The order of its rows is that of their addresses, which
            before compaction is that of the corpus.
        keep: "first" or "last".
        folder: Folder for what the workers exchange. Its name must stand for the rows of the table:
            if it holds results, they are used. The caller removes it.

    Raises:
        IncompleteError: If some parts failed for good.
    """
    groups = fragment_groups(dataset, GROUP_ROWS)
    partitions = num_partitions(dataset.count_rows())
    parted = f"{len(groups)}-{partitions}"
    hashing = HashIds(
        table=table,
        version=dataset.version,
        folder=folder / f"hashed-{parted}",
        partitions=partitions,
    )
    parts = [Part(number, ids) for number, ids in enumerate(groups)]
    files = steps.results("reading ids", hashing, parts, hashing.folder)
    finding = FindRepeated(
        table=table,
        hashed=hashing.folder,
        files=tuple(files),
        folder=folder / f"{keep}-{parted}",
        keep=keep,
        group_starts=tuple(ids[0] for ids in groups),
    )
    parts = [Part(number, number) for number in range(partitions if files else 0)]
    total = 0
    shown: list[list[int]] = []
    written: list[Location] = []
    touched: set[int] = set()
    for _, found in steps.do("finding repeated ids", finding, parts, finding.folder):
        if found["count"]:
            total += found["count"]
            shown = nsmallest(SHOWN, [*shown, *found["shown"]])
            written.append(finding.folder / found["file"])
            touched |= set(found["groups"])
    rows = tuple(row for _, _, row in shown)
    return Repeated(total, rows, tuple(written), tuple(sorted(touched)))


def rows_at(dataset: lance.LanceDataset, rows: Sequence[int], columns: list[str]) -> pa.Table:
    """Return columns of the rows with these addresses, in the order of the addresses given.

    Raises:
        OSError: If the rows cannot be read.
    """
    named = ",".join(map(str, rows)) or "NULL"
    scanner = dataset.scanner(
        columns=columns, filter=f"_rowaddr IN ({named})", with_row_address=True
    )
    found = scanner.to_table()
    places = {row: place for place, row in enumerate(found["_rowaddr"].to_pylist())}
    return found.select(columns).take([places[row] for row in rows])


def hashed_schema() -> pa.Schema:
    """Return the columns of hashed ids: two halves of a hash, and the address of the row."""
    return pa.schema([(name, pa.uint64()) for name in (HIGH, LOW, ROW)])


@dataclass(frozen=True, kw_only=True)
class HashIds(VersionWork):
    """Groups of fragments, of which the ids are hashed into partitions.

    Attributes:
        folder: Where the files go.
        partitions: Number of partitions.
        column: Column of the ids, strings or integers. A null is no id.
    """

    folder: Location
    partitions: int
    column: str = "id"

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is a list of fragment ids, its result the name of a file."""
        dataset = self.dataset()

        def hash_ids(fragment_ids: list[int]) -> str:
            fragments = [dataset.get_fragment(id) for id in fragment_ids]
            scanner = dataset.scanner(
                columns=[self.column], fragments=fragments, with_row_address=True
            )
            rows = [hashed_schema().empty_table()]
            for batch in scanner.to_batches():
                some = batch.filter(batch[self.column].is_valid())
                ids = some[self.column].cast(pa.string()).to_pylist()
                rows.append(pa.table({**hashes_of(ids), ROW: some["_rowaddr"]}))
            name = new_name()
            write_partitions(pa.concat_tables(rows), self.partitions, self.folder / name)
            return name

        return hash_ids


@dataclass(frozen=True, kw_only=True)
class FindRepeated(StepWork):
    """Partitions of hashes, of which the repeated ones are found.

    Attributes:
        hashed: Folder of the files of hashes.
        files: Their names.
        folder: Where the files of repeated rows go.
        keep: "first" or "last".
        group_starts: The first fragment id of each group of fragments.
    """

    hashed: Location
    files: tuple[str, ...]
    folder: Location
    keep: str
    group_starts: tuple[int, ...]

    def load(self, place: Place) -> DoPart:
        """Load nothing. A part is the number of a partition."""
        files = [self.hashed / name for name in self.files]

        def find(number: int) -> dict[str, Any]:
            found = repeated_in(read_partition(files, number), ROW, self.keep)
            if not len(found):
                return {"count": 0}
            name = new_name()
            groups = write_addresses(found[:, 2], self.group_starts, self.folder / name)
            return {
                "count": len(found),
                "shown": found[:SHOWN].tolist(),
                "file": name,
                "groups": np.unique(groups).tolist(),
            }

        return find
