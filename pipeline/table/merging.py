"""Merges staged rows into a table on the workers: rows with the same ids make place for them.

Lance's own `merge_insert` joins in one process and holds all rows to merge in memory, with their
states; where the ids are indexed, it refuses more than 300 MB of them. Here a worker copies some
staged rows into data files of the table and looks up which rows have their ids, others mark those
as deleted, and one commit does both. A row that was replaced has another row id than before, so no
index finds it by its old values.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import xxhash
from lance.dataset import LanceOperation
from lance.fragment import FragmentMetadata, write_fragments
from numpy.typing import NDArray

from kalm_encoder.errors import KalmError
from kalm_encoder.table.ids import ids_in
from kalm_encoder.table.location import Location
from pipeline.messages import Part, Place
from pipeline.table.deletions import marks_of_deletion, write_addresses
from pipeline.table.duplicates import GROUP_ROWS
from pipeline.table.erasures import erased_ids
from pipeline.table.fragments import check_written, fragment_groups, fragments_key
from pipeline.table.partitions import new_name
from pipeline.table.side_files import FINISH
from pipeline.table.steps import DoPart, Steps, VersionWork, remove_step

COPIED_ROWS = 50_000
"""About how many rows one part copies; a staged fragment is never cut."""
COPIED_AT_ONCE = 256
"""Rows that are in memory at the same time as they are copied, with their states."""
LOOKED_UP_AT_ONCE = 10_000
"""Ids that one query looks up. They are sorted, so that the queries share no page of the index."""


@dataclass(frozen=True, kw_only=True)
class CopyRows(VersionWork):
    """Staged rows that are copied into data files of the table.

    Attributes:
        staged: Datasets that hold them, with the columns of the table.
        group_starts: The first fragment id of each group of fragments of the table.
        folder: Where the files go that name the rows to replace.
    """

    staged: tuple[Location, ...]
    group_starts: tuple[int, ...]
    folder: Location

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is the number of a staged dataset and a list of fragment ids.

        Its result has the metadata of the fragments written, the name of the file of the addresses
        of the rows to replace, and the numbers of the groups of fragments that hold any.
        """
        dataset = self.dataset()

        def copy(what: tuple[int, list[int]]) -> dict[str, Any]:
            number, fragment_ids = what
            source = self.staged[number].dataset()
            fragments = [source.get_fragment(id) for id in fragment_ids]
            scanner = source.scanner(fragments=fragments, batch_size=COPIED_AT_ONCE)
            schema = dataset.schema.remove_metadata()

            def rows() -> Iterator[pa.RecordBatch]:
                for batch in scanner.to_batches():
                    yield batch.select(schema.names).cast(schema)

            written = write_fragments(
                pa.RecordBatchReader.from_batches(schema, rows()), dataset, mode="append",
                max_rows_per_file=2**31 - 1,
            )  # fmt: skip
            ids = source.scanner(columns=["id"], fragments=fragments).to_table()["id"]
            self._remove_if_erased(ids, written)
            addresses = _addresses(dataset, ids)
            name = new_name()
            groups = write_addresses(addresses, self.group_starts, self.folder / name)
            return {
                "fragments": [json.dumps(fragment.to_json()) for fragment in written],
                "file": name,
                "groups": np.unique(groups).tolist(),
            }

        return copy

    def _remove_if_erased(self, ids: pa.ChunkedArray, written: list[FragmentMetadata]) -> None:
        """Remove what was just written if one of its rows has been erased since it was staged.

        An erasure records its ids before it removes files, so either it finds these or we find it.
        """
        erased = erased_ids(self.table)
        if any(id in erased for id in ids.to_pylist()):
            session = self.table.file_session()
            for file in (file for fragment in written for file in fragment.files):
                session.delete_file(f"data/{file.path}")
            raise KalmError("some of the passages were erased after they were staged")


def _addresses(dataset: lance.LanceDataset, ids: pa.ChunkedArray) -> NDArray[np.uint64]:
    """Return the addresses of the rows with some of these ids."""
    ordered = ids.combine_chunks().sort().to_pylist()
    found = [np.empty(0, np.uint64)]
    for start in range(0, len(ordered), LOOKED_UP_AT_ONCE):
        wanted = ids_in(ordered[start : start + LOOKED_UP_AT_ONCE])
        rows = dataset.scanner(columns=["id"], filter=wanted, with_row_address=True).to_table()
        found.append(rows["_rowaddr"].to_numpy())
    return np.concatenate(found)


def merge_rows(
    steps: Steps, table: Location, dataset: lance.LanceDataset, staged: Sequence[Location]
) -> LanceOperation.Update:
    """Copy staged rows into data files of a table and mark the rows with the same ids as deleted.

    Args:
        steps: How the parts are done.
        table: Address of the table.
        dataset: The version that the operation is to be committed on.
        staged: Datasets of rows with the columns of the table. No id is in them twice.

    Returns:
        The operation that commits both.

    Raises:
        IncompleteError: If some parts failed for good; the others are not done again.
        KalmError: If files that an interrupted run had written are gone.
    """
    pieces: list[tuple[int, list[int]]] = []
    facts: list[Any] = []
    num_rows = 0
    for number, location in enumerate(staged):
        source = location.dataset()
        pieces += [(number, ids) for ids in fragment_groups(source, COPIED_ROWS)]
        facts += [location.uri, fragments_key(source)]
        num_rows += source.count_rows()
    name = xxhash.xxh3_64_hexdigest(json.dumps([facts, pieces]).encode())
    folder = f"{FINISH}/{fragments_key(dataset)}/merge-{name}"
    group_starts = tuple(ids[0] for ids in fragment_groups(dataset, GROUP_ROWS))
    work = CopyRows(
        table=table, version=dataset.version, staged=tuple(staged), group_starts=group_starts,
        folder=table / folder, is_large=num_rows > LOOKED_UP_AT_ONCE,
    )  # fmt: skip
    parts = [Part(number, piece) for number, piece in enumerate(pieces)]
    copied = steps.results("merging rows", work, parts, table / folder)
    written = [fragment for result in copied for fragment in result["fragments"]]
    files = [result["file"] for result in copied if result["groups"]]
    try:
        check_written(written, table)
        if lacking := set(files) - set((table / folder).file_session().list()):
            raise KalmError(f"{lacking.pop()} in {table / folder} is gone. Run again")
    except KalmError:
        remove_step(table, folder)  # or the next run would find the same result
        raise
    groups = sorted({group for result in copied for group in result["groups"]})
    updated, removed = marks_of_deletion(
        steps, table, dataset, [table / folder / file for file in files], groups, "replaced rows"
    )
    added = [FragmentMetadata.from_json(fragment) for fragment in written]
    return LanceOperation.Update(removed, updated, added)
