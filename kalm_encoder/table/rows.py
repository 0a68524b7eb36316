"""Turns passages into rows of a table, and rows back into passages that match their checksums.

spec.py describes the columns. This module knows nothing of torch, files or commits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kalm_encoder.errors import CorruptRowError
from kalm_encoder.matryoshka import PackedStates, PassageStates, coarsen, num_groups
from kalm_encoder.table.checksums import row_checksum, states_checksum, text_hash
from kalm_encoder.table.metadata import damaged_metadata, with_checksum
from kalm_encoder.table.spec import TableSpec

VECTORS_AT_ONCE = 512
"""Number of states that a codec encodes or decodes at once, so that they stay in a core's cache. A
longer passage is taken whole."""


def build_rows(
    spec: TableSpec,
    ids: Sequence[str],
    texts: Sequence[str],
    passages: PackedStates,
    shard_id: str,
    *,
    hashes: Sequence[bytes] | None = None,
    metadata: pa.Table | None = None,
) -> pa.Table:
    """Turn encoded passages into rows.

    Args:
        spec: Spec of the table.
        ids: Id of each passage.
        texts: Raw texts, not rendered.
        passages: States at the finest ratio, all within the limit of the codec: float32, or of the
            store's dtype if that is the only ratio.
        shard_id: Shard that is recorded with every row.
        hashes: Hashes of the rendered texts, for callers that do not have the texts.
        metadata: The metadata columns of the passages, if the spec has any.

    Returns:
        A table with the schema `spec.schema()`.
    """
    schema = spec.schema()
    hashes = [text_hash(t) for t in texts] if hashes is None else hashes
    columns: dict[str, Any] = {
        "id": ids,
        "text": texts,
        "text_hash": hashes,
        "num_tokens": passages.num_tokens,
        "truncated": passages.truncated,
        "shard_id": pa.repeat(shard_id, len(ids)),
        "checksum": [row_checksum(i, h, shard_id) for i, h in zip(ids, hashes, strict=True)],
    }
    if metadata is not None:
        columns |= with_checksum(ids, metadata)
    facts = [ids, passages.num_tokens.tolist(), passages.truncated.tolist()]
    for ratio in spec.ratios:
        states = coarsen(passages.states, passages.num_tokens, spec.ratios[0], ratio)
        counts = num_groups(passages.num_tokens, ratio)
        stored = states if states.dtype == spec.codec.dtype else _encode(spec, states, counts)
        offsets = np.append(0, (counts + spec.codec.extra).cumsum())
        columns[f"checksum_r{ratio}"] = [
            states_checksum(i, n, truncated, stored[begin:end])
            for i, n, truncated, (begin, end) in zip(
                *facts, pairwise(offsets.tolist()), strict=True
            )
        ]
        columns[f"states_r{ratio}"] = ragged(stored, offsets, schema.field(f"states_r{ratio}").type)
    return pa.table(columns, schema=schema)  # takes the columns of the schema, in its order


def _encode(
    spec: TableSpec, states: NDArray[np.float32], counts: NDArray[np.int64]
) -> NDArray[Any]:
    """Encode the states of passages with these counts of states, in pieces."""
    begins = np.append(0, counts.cumsum())
    places = np.append(0, (counts + spec.codec.extra).cumsum())
    stored = np.empty((places[-1], spec.codec.width(spec.dim)), spec.codec.dtype)
    for rows in _pieces(counts):
        part = states[begins[rows.start] : begins[rows.stop]]
        stored[places[rows.start] : places[rows.stop]] = spec.codec.encode(part, counts[rows])
    return stored


def _pieces(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Cut passages into runs of about VECTORS_AT_ONCE states."""
    full = counts.cumsum() // VECTORS_AT_ONCE
    edges = [0, *(np.flatnonzero(np.diff(full)) + 1).tolist(), len(counts)]
    return (slice(begin, end) for begin, end in pairwise(edges) if begin < end)


def ragged(stored: NDArray[Any], offsets: NDArray[np.int64], type: pa.DataType) -> pa.Array:
    """Build a list<fixed_size_list> column: row i has the vectors from offsets[i] to the next."""
    values = pa.array(stored.reshape(-1), type.value_type.value_type)
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
    ids, *columns = (
        rows[name].to_pylist() for name in ("id", "num_tokens", "truncated", f"checksum_r{stored}")
    )
    flat, offsets = stored_vectors(spec, rows[f"states_r{stored}"].combine_chunks())
    counts = np.diff(offsets) - spec.codec.extra
    num_tokens = np.array(columns[0], np.int64)
    intact = counts == num_groups(num_tokens, stored)
    spans = pairwise(offsets.tolist())
    for i, (key, n, truncated, checksum, (begin, end)) in enumerate(
        zip(ids, *columns, spans, strict=True)
    ):
        intact[i] &= checksum == states_checksum(key, n, truncated, flat[begin:end])
    contents = _contents(rows)
    for piece in _pieces(counts):
        good = intact[piece]
        vectors = flat[offsets[piece.start] : offsets[piece.stop]]
        if not good.all():
            vectors = vectors[np.repeat(good, np.diff(offsets[piece.start : piece.stop + 1]))]
        tokens = num_tokens[piece][good]
        states = spec.codec.decode(vectors, counts[piece][good], spec.dim)
        states = coarsen(states, tokens, stored, ratio)
        ends = num_groups(tokens, ratio).cumsum().tolist()
        parts = (states[begin:end] for begin, end in pairwise([0, *ends]))
        for i in range(piece.start, piece.stop):
            n, truncated, _ = (column[i] for column in columns)
            found = PassageStates(next(parts), n, truncated, contents[i]) if intact[i] else None
            yield ids[i], found


def read_metadata(spec: TableSpec, rows: pa.Table, *, uri: str) -> pa.Table | None:
    """Return the metadata columns of rows and verify their checksums; None if there are none.

    Args:
        spec: Spec of the table.
        rows: Rows with the columns id and `spec.metadata_names`.
        uri: Address of the table, for error messages.

    Raises:
        CorruptRowError: If the metadata of a row are not what was written.
    """
    if not spec.metadata_columns:
        return None
    if damaged := damaged_metadata(rows.select(["id", *spec.metadata_names])):
        raise CorruptRowError(
            f"the metadata of row {damaged[0]!r} of {uri} do not match their checksum: the stored "
            "bytes changed after they were written. Restore the data files, or encode it again."
        )
    return rows.select(spec.metadata_names[:-1])


def renamed_rows(spec: TableSpec, rows: pa.Table, ids: Sequence[str], *, uri: str) -> pa.Table:
    """Return rows under other ids, with checksums made anew after the old ones were verified.

    Args:
        spec: Spec of the table.
        rows: Whole rows. Their metadata and the checksum of these stay as they are.
        ids: New id of each row.
        uri: Address of the table, for error messages.

    Raises:
        CorruptRowError: If the bytes of a row are not what was written.
    """
    old, columns = rows["id"].to_pylist(), {"id": pa.array(ids, pa.string())}

    def renew(name: str, checksum: Callable[..., int], *facts: Iterable[Any]) -> None:
        made = []
        for stored, was, now, *values in zip(rows[name].to_pylist(), old, ids, *facts, strict=True):
            if stored != checksum(was, *values):
                raise CorruptRowError(
                    f"row {was!r} of {uri} does not match its {name}: the stored bytes changed "
                    "after they were written. Restore the data files, or encode it again."
                )
            made.append(checksum(now, *values))
        columns[name] = pa.array(made, pa.uint64())

    renew("checksum", row_checksum, rows["text_hash"].to_pylist(), rows["shard_id"].to_pylist())
    facts = [rows[name].to_pylist() for name in ("num_tokens", "truncated")]
    for ratio in spec.ratios:
        flat, offsets = stored_vectors(spec, rows[f"states_r{ratio}"].combine_chunks())
        states = [flat[begin:end] for begin, end in pairwise(offsets.tolist())]
        renew(f"checksum_r{ratio}", states_checksum, *facts, states)
    for name, column in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.field(name), column)
    return rows


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


def stored_vectors(spec: TableSpec, column: pa.ListArray) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return the vectors of all rows, (n, width), and where each row begins and the last ends."""
    offsets = column.offsets.to_numpy()
    # flatten() honours the slice of the list array; its values start at the first offset.
    flat = column.flatten().flatten().to_numpy().reshape(-1, spec.codec.width(spec.dim))
    return flat, offsets - offsets[0]
