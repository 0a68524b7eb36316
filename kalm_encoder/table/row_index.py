"""An index in memory: where each id of one table version lies, and the small columns of its row.

To find 100 of a million ids, Lance reads 100 pages of its id index and decodes a block of every
small column for each row. With this index only the states are read. It takes 21 bytes per row and 8
more for each stored ratio. The index does not read files, and what it finds is a guess until the
states match their checksum, which covers the id.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

ADDRESS = "_rowaddr"
"""Lance's name for the address of a row, its fragment and offset; fixed within a version."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Arrays with one entry per row, in ascending order of the hashes.

    Attributes:
        hashes: xxh3_64 of each id; two ids may have the same.
        addresses: Address of each row in this version.
        num_tokens: The stored column.
        truncated: The stored column.
        checksums: The stored checksum columns by ratio.
    """

    hashes: NDArray[np.uint64]
    addresses: NDArray[np.uint64]
    num_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    checksums: dict[int, NDArray[np.uint64]]

    @staticmethod
    def columns(ratios: Sequence[int]) -> list[str]:
        """Return the columns that `build` needs."""
        return ["id", ADDRESS, "num_tokens", "truncated", *(f"checksum_r{r}" for r in ratios)]

    @staticmethod
    def size(rows: int, ratios: Sequence[int]) -> int:
        """Return the bytes of an index of so many rows; building it takes half as much again."""
        return rows * (21 + 8 * len(ratios))

    @classmethod
    def build(cls, batches: Iterable[pa.RecordBatch], rows: int, ratios: Sequence[int]) -> RowIndex:
        """Build the index of all rows of a version.

        Args:
            batches: Batches with the columns `columns(ratios)` of all rows.
            rows: Number of rows of the version.
            ratios: All stored ratios.

        Raises:
            ValueError: If the batches have another number of rows.
        """
        hashes, addresses = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        num_tokens, truncated = np.empty(rows, np.int32), np.empty(rows, np.bool_)
        checksums = {ratio: np.empty(rows, np.uint64) for ratio in ratios}
        small: list[NDArray[Any]] = [addresses, num_tokens, truncated, *checksums.values()]
        start = 0
        for batch in batches:
            part = slice(start, start := start + batch.num_rows)
            ids = batch.column(0).to_pylist()
            hashes[part] = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
            for array, column in zip(small, batch.columns[1:], strict=True):
                array[part] = column.to_numpy(zero_copy_only=False)
        if start != rows:
            raise ValueError(f"{start} rows were read, but the version has {rows}")
        order = np.argsort(hashes)
        for array in (hashes, *small):
            array[:] = array[order]
        return cls(hashes, addresses, num_tokens, truncated, checksums)

    @property
    def nbytes(self) -> int:
        """Number of bytes held."""
        return self.size(len(self.hashes), list(self.checksums))

    def find(self, ids: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """Look ids up.

        Args:
            ids: Ids without repetition.

        Returns:
            The entries of the ids whose hash belongs to exactly one row, and the ids whose hash
            belongs to several rows. The table holds none of the other ids.
        """
        wanted = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
        first = np.searchsorted(self.hashes, wanted)
        count = np.searchsorted(self.hashes, wanted, side="right") - first
        single = {ids[i]: int(first[i]) for i in np.flatnonzero(count == 1).tolist()}
        return single, [ids[i] for i in np.flatnonzero(count > 1).tolist()]

    def rows(self, states: pa.Table, asked: dict[str, int], ratio: int) -> pa.Table:
        """Complete states that were read by address to rows that `read_rows` takes.

        Args:
            states: Rows with the states column of `ratio` and the column ADDRESS.
            asked: Entry by id, as `find` returns them.
            ratio: A stored ratio.
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
    """Return the xxh3_64 of an id."""
    return xxhash.xxh3_64_intdigest(id.encode())
