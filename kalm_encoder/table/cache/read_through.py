"""Reads the states of rows from a disk cache where it has them, and keeps those it has not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pyarrow as pa

from kalm_encoder.matryoshka import num_groups
from kalm_encoder.table.cache.cached_table import CachedTable
from kalm_encoder.table.cache.disk_cache import DiskCache
from kalm_encoder.table.cache.erasures import erasure_state
from kalm_encoder.table.cache.key_index import Words, record_keys
from kalm_encoder.table.checksums import states_checksum
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import ragged, stored_vectors
from kalm_encoder.table.spec import TableSpec


class CachedStates:
    """The cached states of one version of a table.

    Args:
        cache: The cache.
        table: Where the table lies.
        version: Number of the version.
        spec: Spec of the table.

    Raises:
        KalmError: If the erasures of the table cannot be read.
    """

    def __init__(self, cache: DiskCache, table: Location, version: int, spec: TableSpec) -> None:
        self.table: CachedTable = cache.table(table.uri)
        self._spec = spec
        # None if an erasure removed the version meanwhile: its states are not kept any more.
        self._state = erasure_state(table, version)
        if self._state is not None:
            self.table.adopt(self._state)

    def read(self, rows: pa.Table, ratio: int, fetch: Callable[[pa.Table], pa.Table]) -> pa.Table:
        """Return rows with their states, from the cache or from the store.

        Args:
            rows: Rows with the columns id, num_tokens, truncated and checksum_r of `ratio`.
            ratio: A stored ratio.
            fetch: Function that returns some of these rows with their states, from the store, in
                any order. It may leave out those that are not there.

        Returns:
            The rows in any order. As those from the store, those from the cache are not compared
            with their checksums yet.
        """
        name, spec = f"states_r{ratio}", self._spec
        counts = num_groups(rows["num_tokens"].to_numpy(), ratio) + spec.codec.extra
        held = self.table.get(_keys(rows, ratio), (counts * spec.bytes_per_state).tolist())
        there = [i for i, states in enumerate(held) if states is not None]
        parts = []
        if len(there) < len(held):
            parts.append(fetch(rows.take([i for i, states in enumerate(held) if states is None])))
            self._keep(parts[0], ratio)
        if there:
            stored = np.frombuffer(b"".join(held[i] or b"" for i in there), spec.codec.dtype)
            offsets = np.append(0, counts[there].cumsum())
            # Lance reads the states with a type that allows nulls in other places than the spec.
            type = (parts[0].schema if parts else spec.schema()).field(name).type
            part = rows.take(there).append_column(name, ragged(stored, offsets, type))
            parts.append(part.select(parts[0].column_names) if parts else part)
        return pa.concat_tables(parts)

    def _keep(self, rows: pa.Table, ratio: int) -> None:
        """Keep the states of rows that match their checksums."""
        if self._state is None or not len(rows):
            return
        flat, offsets = stored_vectors(self._spec, rows[f"states_r{ratio}"].combine_chunks())
        states = [flat[begin:end] for begin, end in pairwise(offsets.tolist())]
        names = ("id", "num_tokens", "truncated", f"checksum_r{ratio}")
        facts = zip(*(rows[name].to_pylist() for name in names), states, strict=True)
        intact = [
            i
            for i, (id, n, truncated, checksum, one) in enumerate(facts)
            if states_checksum(id, n, truncated, one) == checksum
        ]
        contents = [states[i].data.cast("B") for i in intact]
        self.table.put(_keys(rows, ratio)[intact], contents, self._state)


def _keys(rows: pa.Table, ratio: int) -> Words:
    return record_keys(rows[f"checksum_r{ratio}"].to_numpy(), ratio)
