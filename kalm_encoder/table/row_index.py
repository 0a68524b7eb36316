"""Where each id of one table version lies, and all that is small of its row, held in memory.

Asked for 100 of a million ids, Lance reads 100 pages of its id index, and decodes a block of every
light column for each row. With this, only the states are read. A row costs 21 bytes and 8 for each
stored ratio. Nothing here reads files: what is found is a guess until the states read there fit
their checksum, which covers the id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import xxhash

if TYPE_CHECKING:
    from numpy.typing import NDArray

ADDRESS = "_rowaddr"
"""What Lance calls the place of a row: fragment and offset, fixed within a version."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Arrays of one entry a row, in the order of the hashes.

    Attributes:
        hashes: xxh3_64 of the id; two ids may share one.
        addresses: of the row in this version.
        num_tokens: as stored.
        truncated: as stored.
        checksums: as stored, by ratio.
    """

    hashes: NDArray[np.uint64]
    addresses: NDArray[np.uint64]
    num_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    checksums: dict[int, NDArray[np.uint64]]

    @staticmethod
    def columns(ratios: Sequence[int]) -> list[str]:
        """Return the columns of the batches that `build` takes."""
        return ["id", ADDRESS, "num_tokens", "truncated", *(f"checksum_r{r}" for r in ratios)]

    @staticmethod
    def size(rows: int, ratios: Sequence[int]) -> int:
        """Return the bytes an index of so many rows holds; building it takes half as much again."""
        return rows * (21 + 8 * len(ratios))

    @classmethod
    def build(cls, batches: Iterable[pa.RecordBatch], rows: int, ratios: Sequence[int]) -> RowIndex:
        """Build the index of all rows of a version.

        Args:
            batches: with `columns(ratios)`, `rows` rows together.
            rows: of the version.
            ratios: all stored ones.

        Raises:
            ValueError: another number of rows.
        """
        hashes, addresses = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        num_tokens, truncated = np.empty(rows, np.int32), np.empty(rows, np.bool_)
        checksums = {ratio: np.empty(rows, np.uint64) for ratio in ratios}
        light: list[NDArray[Any]] = [addresses, num_tokens, truncated, *checksums.values()]
        start = 0
        for batch in batches:
            part = slice(start, start := start + batch.num_rows)
            ids = batch.column(0).to_pylist()
            hashes[part] = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
            for array, column in zip(light, batch.columns[1:], strict=True):
                array[part] = column.to_numpy(zero_copy_only=False)
        if start != rows:
            raise ValueError(f"{start} rows where the version counts {rows}")
        order = np.argsort(hashes)
        for array in (hashes, *light):
            array[:] = array[order]
        return cls(hashes, addresses, num_tokens, truncated, checksums)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.size(len(self.hashes), list(self.checksums))

    def find(self, ids: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """Look ids up.

        Args:
            ids: different ones.

        Returns:
            The entry of each id whose hash one row has, most likely its own; and the ids whose hash
            several rows have. All others are in no row.
        """
        wanted = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
        first = np.searchsorted(self.hashes, wanted)
        count = np.searchsorted(self.hashes, wanted, side="right") - first
        single = {ids[i]: int(first[i]) for i in np.flatnonzero(count == 1).tolist()}
        return single, [ids[i] for i in np.flatnonzero(count > 1).tolist()]

    def rows(self, states: pa.Table, asked: dict[str, int], ratio: int) -> pa.Table:
        """Complete states read at their addresses to rows, as `read_rows` takes them.

        Args:
            states: columns states_r of `ratio` and ADDRESS.
            asked: entry by id, as `find` returns them.
            ratio: a stored one.
        """
        ids = {int(self.addresses[entry]): id for id, entry in asked.items()}
        order = [ids[address] for address in states[ADDRESS].to_pylist()]
        at = [asked[id] for id in order]
        return pa.table(
            {
                "id": pa.array(order, pa.string()),
                "num_tokens": self.num_tokens[at],
                "truncated": self.truncated[at],
                f"states_r{ratio}": states[f"states_r{ratio}"],
                f"checksum_r{ratio}": self.checksums[ratio][at],
            }
        )


def id_hash(id: str) -> int:
    """Return xxh3_64 of an id."""
    return xxhash.xxh3_64_intdigest(id.encode())
