"""Turns passages into rows of a table, and rows back into passages that match their checksums.

spec.py describes the columns. This module knows nothing of torch, files or commits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_encoder.errors import CorruptRowError
from kalm_encoder.matryoshka import PassageStates, coarsen, num_groups
from kalm_encoder.table.checksums import row_checksum, states_checksum, text_hash
from kalm_encoder.table.spec import TableSpec


def build_rows(
    spec: TableSpec,
    ids: Sequence[str],
    texts: Sequence[str],
    passages: Sequence[PassageStates],
    shard_id: str,
    *,
    hashes: Sequence[bytes] | None = None,
) -> pa.Table:
    """Turn encoded passages into rows.

    Args:
        spec: Spec of the table.
        ids: Id of each passage.
        texts: Raw texts, not rendered.
        passages: float32 states at the finest ratio, all within the limit of the codec.
        shard_id: Shard that is recorded with every row.
        hashes: Hashes of the rendered texts, for callers that do not have the texts.

    Returns:
        A table with the schema `spec.schema()`.
    """
    schema = spec.schema()
    hashes = [text_hash(t) for t in texts] if hashes is None else hashes
    columns: dict[str, Any] = {
        "id": ids,
        "text": texts,
        "text_hash": hashes,
        "num_tokens": [p.num_tokens for p in passages],
        "truncated": [p.truncated for p in passages],
        "shard_id": [shard_id] * len(ids),
        "checksum": [row_checksum(i, h, shard_id) for i, h in zip(ids, hashes, strict=True)],
    }
    for ratio in spec.ratios:
        arrays = [
            spec.codec.encode(coarsen(p.states, p.num_tokens, spec.ratios[0], ratio))
            for p in passages
        ]
        columns[f"checksum_r{ratio}"] = [
            states_checksum(i, p.num_tokens, p.truncated, a)
            for i, p, a in zip(ids, passages, arrays, strict=True)
        ]
        columns[f"states_r{ratio}"] = _ragged(arrays, schema.field(f"states_r{ratio}").type)
    return pa.table(columns, schema=schema)  # takes the columns of the schema, in its order


def _ragged(arrays: Sequence[NDArray[Any]], type: pa.DataType) -> pa.Array:
    """Build a list<fixed_size_list> column from arrays of shape (m_i, width)."""
    offsets = np.cumsum([0, *(len(a) for a in arrays)])
    flat = np.concatenate(arrays).reshape(-1) if arrays else np.empty(0, np.float32)
    values = pa.array(flat, type.value_type.value_type)
    vectors = pa.FixedSizeListArray.from_arrays(values, type=type.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), vectors, type=type)


def read_rows(spec: TableSpec, rows: pa.Table, ratio: int, *, uri: str) -> dict[str, PassageStates]:
    """Turn rows back into passages and verify the checksum of each row.

    Args:
        spec: Spec of the table.
        rows: Rows with the columns id, num_tokens, truncated, and states_r and checksum_r of
            `spec.source_ratio(ratio)`; perhaps with text_hash, or its first half as content.
        ratio: Ratio of the states to return.
        uri: Address of the table, for error messages.

    Returns:
        Passages by id. The states are float16 if the store is float16 and `ratio` is stored, and
        float32 otherwise.

    Raises:
        CorruptRowError: If the bytes of a row are not what was written, or an id occurs twice.
    """
    passages: dict[str, PassageStates] = {}
    for key, passage in verified_rows(spec, rows, ratio):
        if key in passages:
            raise CorruptRowError(f"id {key!r} is in {uri} more than once; encode it again")
        if passage is None:
            raise CorruptRowError(
                f"row {key!r} of {uri} does not match its checksum: the stored bytes changed "
                "after they were written. Restore the data files, or encode it again."
            )
        passages[key] = passage
    return passages


def verified_rows(
    spec: TableSpec, rows: pa.Table, ratio: int
) -> Iterator[tuple[str, PassageStates | None]]:
    """Yield the id and the passage of each row; the passage is None if its checksum does not match.

    The arguments are those of `read_rows`.
    """
    stored = spec.source_ratio(ratio)
    columns = [
        rows[name].to_pylist() for name in ("id", "num_tokens", "truncated", f"checksum_r{stored}")
    ]
    states = _states(spec, rows[f"states_r{stored}"].combine_chunks())
    zipped = zip(*columns, _contents(rows), states, strict=True)
    for key, n, truncated, checksum, content, array in zipped:
        intact = checksum == states_checksum(key, n, truncated, array)
        if not intact or len(array) != num_groups(n, stored):
            yield key, None
            continue
        values = spec.codec.decode(array, spec.dim)
        yield key, PassageStates(coarsen(values, n, stored, ratio), n, truncated, content)


def _contents(rows: pa.Table) -> list[int] | list[None]:
    if "content" in rows.column_names:
        contents: list[int] = rows["content"].to_pylist()
        return contents
    if "text_hash" in rows.column_names:
        halves: list[int] = first_halves(rows["text_hash"].combine_chunks()).tolist()
        return halves
    return [None] * len(rows)


def first_halves(hashes: pa.FixedSizeBinaryArray) -> NDArray[np.uint64]:
    """Return the first 8 of the 16 bytes of each hash as a number."""
    buffer = hashes.buffers()[1]
    words = np.frombuffer(buffer if len(hashes) else b"", ">u8")[::2]
    return words[hashes.offset : hashes.offset + len(hashes)].astype(np.uint64)


def _states(spec: TableSpec, column: pa.ListArray) -> Iterator[NDArray[Any]]:
    """Yield the states of each row as an (m, width) view of the stored values."""
    offsets = column.offsets.to_numpy()
    # flatten() honours the slice of the list array; its values start at the first offset.
    flat = column.flatten().flatten().to_numpy().reshape(-1, spec.codec.width(spec.dim))
    for begin, end in pairwise(offsets - offsets[0]):
        yield flat[begin:end]
