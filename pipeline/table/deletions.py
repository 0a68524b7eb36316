"""Marks of deletion, which workers write for rows whose addresses are in files of groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import FragmentMetadata
from numpy.typing import NDArray

from kalm_encoder.table.location import Location
from pipeline.messages import Part, Place
from pipeline.table.partitions import ROW, read_partition, write_groups
from pipeline.table.steps import DoPart, Steps, VersionWork


def marks_of_deletion(
    steps: Steps,
    table: Location,
    dataset: lance.LanceDataset,
    files: Sequence[Location],
    groups: Sequence[int],
    what: str,
) -> tuple[list[FragmentMetadata], list[int]]:
    """Write the marks of deletion of some rows, which a commit is to name.

    Args:
        steps: How the parts are done.
        table: Address of the table.
        dataset: The version from which they are deleted. Rows that are gone already are no error.
        files: Files of groups with the addresses of the rows, see `write_groups`.
        groups: Numbers of the groups that hold any.
        what: What they are, such as "repeated rows".

    Returns:
        The changed fragments with their marks, and the ids of those of which no row is left.

    Raises:
        IncompleteError: If some parts failed for good.
    """
    work = DeleteRows(table=table, version=dataset.version, files=tuple(files))
    parts = [Part(number, group) for number, group in enumerate(groups)]
    changed: dict[int, str | None] = {}
    for _, fragments in steps.do(f"deleting {what}", work, parts):
        changed |= {int(id): fragment for id, fragment in fragments.items()}
    updated = [FragmentMetadata.from_json(text) for _, text in sorted(changed.items()) if text]
    return updated, [id for id in sorted(changed) if not changed[id]]


def write_addresses(
    addresses: NDArray[np.uint64], group_starts: Sequence[int], file: Location
) -> NDArray[np.int64]:
    """Write the addresses of rows that are to be deleted, unless there are none.

    Args:
        addresses: (rows,) the addresses.
        group_starts: The first fragment id of each group of fragments.
        file: File to write.

    Returns:
        (rows,) the number of the group that holds each row.

    Raises:
        OSError: If the store refuses.
    """
    starts = np.array(group_starts, np.uint64)
    groups = np.searchsorted(starts, addresses >> np.uint64(32), side="right") - 1
    if len(addresses):
        write_groups(pa.table({ROW: addresses}), groups, len(starts), file)
    return groups


@dataclass(frozen=True, kw_only=True)
class DeleteRows(VersionWork):
    """Groups of fragments, of which rows are deleted.

    Attributes:
        files: Files that hold the addresses of the rows.
    """

    files: tuple[Location, ...]

    def load(self, place: Place) -> DoPart:
        """Open the table. A part is the number of a group of fragments.

        Its result has the new metadata of each changed fragment by its id, None if no row is left.
        """
        dataset = self.dataset()

        def delete(group: int) -> dict[str, Any]:
            rows = np.sort(pa.concat_tables(read_partition(self.files, group))[ROW].to_numpy())
            ids, begins = np.unique(rows >> np.uint64(32), return_index=True)
            offsets = np.split(rows & np.uint64(0xFFFFFFFF), begins[1:])
            changed: dict[str, str | None] = {}
            for id, some in zip(ids.tolist(), offsets, strict=True):
                if fragment := dataset.get_fragment(id):  # else all of its rows are gone already
                    left = fragment.delete_rows(some.tolist())
                    changed[str(id)] = left and json.dumps(left.to_json())
            return changed

        return delete
