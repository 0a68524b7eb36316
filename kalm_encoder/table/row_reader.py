"""Rows of a table back to passages, each verified against its checksum. The other way: rows.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kalm_encoder.errors import CorruptRowError
from kalm_encoder.matryoshka import PassageStates, coarsen, num_groups
from kalm_encoder.table.checksums import states_checksum
from kalm_encoder.table.rows import TableSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_rows(
    spec: TableSpec, rows: pa.Table, *, stored: int, wanted: int, uri: str
) -> dict[str, PassageStates]:
    """Turn rows back into passages, verifying each row's checksum.

    Args:
        spec: the table's.
        rows: columns id, num_tokens, truncated, states_r and checksum_r of `stored`.
        stored: ratio of the states column that was read.
        wanted: ratio to return, a multiple of `stored`.
        uri: of the table, for messages.

    Returns:
        Passages by id; states float16 in a float16 store where `wanted == stored`, else float32.

    Raises:
        CorruptRowError: bytes that are not what was written, or an id that is there twice.
    """
    passages: dict[str, PassageStates] = {}
    for key, passage in verified(spec, rows, stored=stored, wanted=wanted):
        if key in passages:
            raise CorruptRowError(f"id {key!r} is in {uri} more than once; encode it again")
        if passage is None:
            raise CorruptRowError(
                f"row {key!r} of {uri} does not match its checksum: the stored bytes changed "
                "after they were written. Restore the data files, or encode it again."
            )
        passages[key] = passage
    return passages


def verified(
    spec: TableSpec, rows: pa.Table, *, stored: int, wanted: int
) -> Iterator[tuple[str, PassageStates | None]]:
    """Yield each row's id and passage; None instead of one that does not match its checksum.

    Args are those of `read_rows`.
    """
    rows = rows.combine_chunks()
    columns = [rows[c].to_pylist() for c in ("id", "num_tokens", "truncated")]
    sums = rows[f"checksum_r{stored}"].to_pylist()
    arrays = states_arrays(spec, rows[f"states_r{stored}"])
    for key, n, truncated, checksum, states in zip(*columns, sums, arrays, strict=True):
        intact = checksum == states_checksum(key, n, truncated, states)
        if not intact or len(states) != num_groups(n, stored):
            yield key, None
            continue
        values = spec.codec.decode(states, spec.dim)
        yield key, PassageStates(coarsen(values, n, stored, wanted), n, truncated)


def states_arrays(spec: TableSpec, column: pa.ChunkedArray) -> list[NDArray[Any]]:
    """Return each row of a states column as an (m, width) view of what is stored."""
    arrays = []
    width = spec.codec.width(spec.dim)
    for chunk in column.chunks:
        first = chunk.offsets[0].as_py() if len(chunk) else 0
        # flatten() honours the slice of the list array; its values start at the first offset.
        flat = chunk.flatten().flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
        offsets = chunk.offsets.to_numpy() - first
        arrays += [flat[offsets[i] : offsets[i + 1]] for i in range(len(chunk))]
    return arrays
