"""Metadata columns: what a corpus says of its passages beside their text, such as their language.

A table holds them under the names that the corpus gives them, nullable, and covers them by one
checksum per row. A value is one of the TYPES. Dates are kept as text, as ISO 8601 writes them: then
they compare as dates do, and no filter needs a cast.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.checksums import framed

Columns = tuple[tuple[str, str], ...]
"""The name and the type of each metadata column."""
TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "list<string>": pa.list_(pa.string()),
}
CHECKSUM = "checksum_metadata"
"""Column of the checksum. A table without metadata columns has none."""
OWN_NAMES = re.compile(
    r"id|text|text_hash|num_tokens|truncated|shard_id|checksum(_.*)?|states_r\d+", re.IGNORECASE
)
"""Names of the columns that a table has itself. Lance tells no upper case from lower case."""


def check_columns(columns: Sequence[tuple[str, str | None]]) -> None:
    """Refuse metadata columns that no table can have; a type that is None is not known yet.

    Raises:
        InputError: If a name is one of the table's own, cannot be a name in a filter or is there
            twice, or if a type is unknown.
    """
    seen: set[str] = set()
    for name, type in columns:
        if OWN_NAMES.fullmatch(name):
            raise InputError(
                f"the table has a column {name!r} of its own: rename the column of the corpus to "
                "keep it"
            )
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
            raise InputError(
                f"the column {name!r} cannot be kept: a filter could not name it. Rename it to a "
                "letter, followed by letters, digits and _"
            )
        if name.casefold() in seen:
            raise InputError(f"the column {name!r} would be kept twice: name it once")
        if type is not None and type not in TYPES:
            raise InputError(
                f"the column {name!r} cannot be kept as {type!r}: give one of {', '.join(TYPES)}"
            )
        seen.add(name.casefold())


def kept_type(type: pa.DataType) -> str | None:
    """Return the name of the type in which a column of a file is kept; None if there is none.

    Whole numbers are kept in 32 or 64 bits, whichever holds all values; of a uint64 those that
    64 bits with a sign hold.
    """
    is_ = pa.types
    if is_.is_dictionary(type):
        return kept_type(type.value_type)
    if is_.is_list(type) or is_.is_large_list(type):
        return "list<string>" if kept_type(type.value_type) == "string" else None
    if is_.is_string(type) or is_.is_large_string(type) or is_.is_string_view(type):
        return "string"
    if is_.is_integer(type):
        return "int32" if type.bit_width < 32 or type == pa.int32() else "int64"
    if is_.is_floating(type):
        return "float64" if type == pa.float64() else "float32"
    return "bool" if is_.is_boolean(type) else None


def metadata_checksums(ids: Sequence[str], metadata: pa.Table) -> list[int]:
    """Return the checksum of each row: xxh3_64 over (length of id, id, the values in order).

    A null is one byte 0. Any other value is one byte 1, then a number or a bool as int64, a
    floating-point number as float64, a string as its length and its bytes, a list as its length and
    its values; all little endian, and lengths as uint32.
    """
    columns = [_packed(column) for column in metadata.itercolumns()]
    return [
        xxhash.xxh3_64_intdigest(framed(id) + b"".join(values))
        for id, *values in zip(ids, *columns, strict=True)
    ]


def with_checksum(ids: Sequence[str], metadata: pa.Table) -> dict[str, Any]:
    """Return the metadata columns of rows by name, and the column of their checksum."""
    columns = dict(zip(metadata.column_names, metadata.columns, strict=True))
    return {**columns, CHECKSUM: pa.array(metadata_checksums(ids, metadata), pa.uint64())}


def damaged_metadata(rows: pa.Table) -> list[str]:
    """Return the ids of the rows whose metadata do not match their checksum.

    Args:
        rows: Rows with the columns id, the metadata columns in their order, and the checksum.
    """
    ids, metadata = rows["id"].to_pylist(), rows.drop_columns(["id", CHECKSUM])
    checksums = zip(ids, rows[CHECKSUM].to_pylist(), metadata_checksums(ids, metadata), strict=True)
    return [id for id, stored, made in checksums if stored != made]


def _packed(column: pa.ChunkedArray) -> list[bytes]:
    pack: Callable[[Any], bytes]
    if column.type == pa.string():
        pack = framed
    elif pa.types.is_list(column.type):
        pack = _packed_list
    else:
        pack = struct.Struct("<d" if pa.types.is_floating(column.type) else "<q").pack
    return [b"\0" if value is None else b"\1" + pack(value) for value in column.to_pylist()]


def _packed_list(values: Sequence[str | None]) -> bytes:
    packed = (b"\0" if value is None else b"\1" + framed(value) for value in values)
    return struct.pack("<I", len(values)) + b"".join(packed)
