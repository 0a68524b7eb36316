"""An index in memory: where each id of one table version lies, and the small columns of its row.

To find 100 of a million ids, Lance reads 100 pages of its id index and decodes a block of every
small column for each row. With this index only the states are read. It takes 29 bytes per row and 8
more for each stored ratio. What the index finds is a guess until the states match their checksum,
which covers the id.

With 4 bytes more per row it also finds rows by their text: a guess until their whole hash is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from kalm_encoder.table.rows import first_halves

ADDRESS = "_rowaddr"
"""Lance's name for the address of a row, its fragment and offset; fixed within a version."""
BATCH_ROWS = 65536
"""Number of rows that are read together to build an index."""


@dataclass(frozen=True, slots=True)
class RowIndex:
    """Arrays with one entry per row, in ascending order of the hashes.

    Attributes:
        hashes: xxh3_64 of each id, uint64; two ids may have the same.
        columns: The address of each row in this version and its small columns, by name.
    """

    hashes: NDArray[np.uint64]
    columns: dict[str, NDArray[Any]]

    @staticmethod
    def size(rows: int, ratios: Sequence[int]) -> int:
        """Return the bytes of an index of so many rows; building it takes half as much again."""
        return rows * (29 + 8 * len(ratios))

    @classmethod
    def build(cls, dataset: lance.LanceDataset, ratios: Sequence[int]) -> RowIndex:
        """Build the index of all rows of a version, from its small columns.

        Args:
            dataset: The version.
            ratios: All stored ratios.

        Raises:
            OSError: If the columns cannot be read.
            ValueError: If Lance refuses them, or reads another number of rows than there are.
        """
        rows = dataset.count_rows()
        types = {ADDRESS: np.uint64, "num_tokens": np.int32, "truncated": np.bool_}
        types |= {f"checksum_r{ratio}": np.uint64 for ratio in ratios}
        columns = {name: np.empty(rows, type) for name, type in types.items()}
        hashes = np.empty(rows, np.uint64)
        start = 0
        content = np.empty(rows, np.uint64)
        names = ["id", "text_hash", *columns]
        for batch in dataset.scanner(names, batch_size=BATCH_ROWS).to_batches():
            part = slice(start, start := start + batch.num_rows)
            hashes[part] = _hashes(batch["id"].to_pylist())
            content[part] = first_halves(batch["text_hash"])
            for name, column in columns.items():
                column[part] = batch[name].to_numpy(zero_copy_only=False)
        if start != rows:
            raise ValueError(f"{start} rows were read, but the version has {rows}")
        columns["content"] = content
        order = np.argsort(hashes, kind="stable")
        for array in (hashes, *columns.values()):
            array[:] = array[order]
        return cls(hashes, columns)

    @property
    def nbytes(self) -> int:
        """Number of bytes held."""
        return self.hashes.nbytes + sum(column.nbytes for column in self.columns.values())

    def find(self, ids: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """Look ids up.

        Args:
            ids: Ids without repetition.

        Returns:
            The entries of the ids whose hash belongs to exactly one row, and the ids whose hash
            belongs to several rows. The table holds none of the other ids.
        """
        wanted = _hashes(ids)
        first = np.searchsorted(self.hashes, wanted)
        count = np.searchsorted(self.hashes, wanted, side="right") - first
        single = {ids[i]: int(first[i]) for i in np.flatnonzero(count == 1).tolist()}
        return single, [ids[i] for i in np.flatnonzero(count > 1).tolist()]

    def rows(self, asked: dict[str, int]) -> pa.Table:
        """Return the addresses and small columns of rows.

        Args:
            asked: Entry by id, as `find` returns them.
        """
        entries = list(asked.values())
        small = {name: column[entries] for name, column in self.columns.items()}
        return pa.table({"id": pa.array(list(asked), pa.string()), **small})


def with_states(rows: pa.Table, states: pa.Table) -> pa.Table:
    """Complete rows by states that were read by address.

    Args:
        rows: Rows with the column ADDRESS.
        states: A states column and the column ADDRESS, in any order; some rows may not be there.
    """
    places = {address: i for i, address in enumerate(rows[ADDRESS].to_pylist())}
    found = rows.take([places[address] for address in states[ADDRESS].to_pylist()])
    name = next(name for name in states.column_names if name != ADDRESS)
    return found.append_column(name, states[name])


@dataclass(frozen=True, slots=True)
class TextOrder:
    """The rows of an index in the order of their texts' hashes.

    Attributes:
        contents: First 8 bytes of the text hash of each entry of the index, uint64.
        addresses: Address of the row of each entry, uint64.
        order: Entries in ascending order of their contents, and of the hashes of their ids where
            these are equal: uint32, or uint64 if there are too many rows.
    """

    contents: NDArray[np.uint64]
    addresses: NDArray[np.uint64]
    order: NDArray[np.uint32] | NDArray[np.uint64]

    @staticmethod
    def size(rows: int) -> int:
        """Return the bytes that it takes beside an index of so many rows."""
        return rows * _entry_type(rows).itemsize

    @classmethod
    def of(cls, index: RowIndex) -> TextOrder:
        """Sort the rows of an index."""
        contents = index.columns["content"]
        order = np.argsort(contents, kind="stable").astype(_entry_type(len(contents)))
        return cls(contents, index.columns[ADDRESS], order)

    def only(self, addresses: NDArray[np.uint64]) -> TextOrder:
        """Return the order of those rows that have one of these addresses, as if all were."""
        kept = np.isin(self.addresses[self.order], addresses)
        return replace(self, order=self.order[kept])

    @property
    def nbytes(self) -> int:
        """Number of bytes held beside the index."""
        return self.order.nbytes

    def find(self, hashes: Sequence[bytes]) -> dict[bytes, NDArray[Any]]:
        """Look texts up.

        Args:
            hashes: Text hashes of 16 bytes, without repetition.

        Returns:
            For each hash that shares its first 8 bytes with rows, the entries of all of these,
            always in the same order.
        """
        wanted = first_halves(pa.array(hashes, pa.binary(16)))
        begins, ends = self._bisect(wanted, np.less), self._bisect(wanted, np.less_equal)
        return {
            hashes[i]: self.order[begins[i] : ends[i]]
            for i in np.flatnonzero(ends > begins).tolist()
        }

    def at(self, entries: NDArray[Any]) -> NDArray[np.uint64]:
        """Return the addresses of entries."""
        addresses: NDArray[np.uint64] = self.addresses[entries]
        return addresses

    def _bisect(self, wanted: NDArray[np.uint64], is_before: np.ufunc) -> NDArray[np.int64]:
        """Return how many entries are before each value: np.searchsorted would copy the order."""
        low = np.zeros(len(wanted), np.int64)
        high = np.full(len(wanted), len(self.order))
        while (apart := low < high).any():
            middle = np.minimum((low + high) // 2, len(self.order) - 1)
            before = is_before(self.contents[self.order[middle]], wanted)
            low = np.where(apart & before, middle + 1, low)
            high = np.where(apart & ~before, middle, high)
        return low


def _entry_type(rows: int) -> np.dtype[Any]:
    return np.dtype(np.uint32 if rows <= 1 << 32 else np.uint64)


def _hashes(ids: Sequence[str]) -> NDArray[np.uint64]:
    return np.fromiter(map(id_hash, ids), np.uint64, len(ids))


def id_hash(id: str) -> int:
    """Return the xxh3_64 of an id."""
    return xxhash.xxh3_64_intdigest(id.encode())
