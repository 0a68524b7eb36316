"""Fields of a corpus that are kept become metadata columns; a value of another type is a reject.

Values are converted a shard at a time. Where that fails, halves of it are tried, down to the values
that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa

from kalm_encoder.errors import InputError
from kalm_encoder.table.metadata import TYPES, kept_type
from pipeline.corpus.passages import Fields, Passage, RawRow, Reject

Values: TypeAlias = "Sequence[Any] | pa.ChunkedArray"
"""The values of one field, of JSON, of cells or of a column."""
UNFIT = pa.ArrowException, TypeError, ValueError, OverflowError
"""What pyarrow raises where a value cannot have a type."""
TOO_LENIENT = {
    "int32": float,
    "int64": float,
    "float32": bool,
    "float64": bool,
    "list<string>": str,
}
"""What pyarrow would take for a type: 1.5 as 1, True as 1.0, and the letters of a string."""


def column_type(field: pa.Field, given: str | None, path: str) -> str:
    """Return the type in which a column of a file is kept: the one that was given, or its own.

    Raises:
        InputError: If its values cannot have that type.
    """
    if (chosen := given or kept_type(field.type)) and _can_become(field.type, chosen):
        return chosen
    what = f"column {field.name!r} of {path} is {field.type}, which cannot be kept"
    if given is None and _can_become(field.type, "string"):
        raise InputError(f"{what} as it is: keep it as text, with --keep {field.name}:string")
    raise InputError(f"{what}{f' as {given}' if given else ''}: convert it, or leave it out")


def _can_become(kind: pa.DataType, type: str) -> bool:
    """Return whether values of a column can be converted to a type at all."""
    try:
        pa.nulls(0, kind).cast(TYPES[type])
    except pa.ArrowNotImplementedError:
        return False
    return True


def text_fields(rows: Sequence[RawRow], fields: Fields) -> dict[str, Values]:
    """Return the values of the fields to keep, of the rows of a text file."""
    known = [row if isinstance(row, dict) else {} for row in rows]
    return {name: [row.get(name) for row in known] for name in fields.kept_names}


def with_metadata(
    found: Sequence[Passage | Reject],
    values: Mapping[str, Values],
    fields: Fields,
    path: str,
    *,
    are_cells: bool,
) -> tuple[list[Passage | Reject], pa.Table]:
    """Convert the values of the fields to keep; a passage with one that does not fit is rejected.

    Args:
        found: What became of each row of a shard.
        values: The values of each field, in the same order.
        fields: The fields to keep, and their types.
        path: Path of the file.
        are_cells: Whether the values are cells of CSV or TSV, which are strings. An empty one is
            null, unless strings are kept.

    Returns:
        What became of each row now, and the metadata of the passages among them.
    """
    now, arrays = list(found), []
    for name, type in fields.keep:
        parts, unfit = _converted(values[name], partial(_convert, type, are_cells), TYPES[type])
        arrays.append(pa.chunked_array(parts, TYPES[type]))
        for place in unfit:
            if isinstance(passage := now[place], Passage):
                reason = f"field {name!r} holds {_shown(values[name][place])}, which is no {type}"
                now[place] = Reject(path, passage.line, reason, passage.id)
    are_passages = pa.array([isinstance(row, Passage) for row in now], pa.bool_())
    return now, pa.table(arrays, names=fields.kept_names).filter(are_passages)


def _converted(
    values: Values, convert: Callable[[Values], pa.Array], type: pa.DataType
) -> tuple[list[pa.Array], list[int]]:
    """Return the converted values in parts, null where one does not fit, and where that is."""
    try:
        return [convert(values)], []
    except UNFIT:
        if len(values) == 1:
            return [pa.nulls(1, type)], [0]
    half = len(values) // 2
    parts, unfit = _converted(values[:half], convert, type)
    more, others = _converted(values[half:], convert, type)
    return parts + more, unfit + [half + place for place in others]


def _convert(type: str, are_cells: bool, values: Values) -> pa.Array:
    """Return values as an array of a type.

    Raises:
        One of UNFIT: Some value does not fit. Only text is parsed, and only where it is all there
            is: in cells and in columns.
    """
    wanted = TYPES[type]
    if isinstance(values, pa.ChunkedArray):
        if pa.types.is_timestamp(values.type) and values.type.tz:
            values = values.cast(pa.timestamp(values.type.unit, "UTC"))
        array = values.cast(wanted).combine_chunks()
        array.validate(full=True)  # a cast lets strings through that are not UTF-8
        return array
    if are_cells and type != "string":
        return pa.array([value or None for value in values], pa.string()).cast(wanted)
    if any(isinstance(value, TOO_LENIENT.get(type, ())) for value in values):
        raise TypeError
    return pa.array(values, wanted)


def _shown(value: Any) -> str:
    if isinstance(value, pa.Scalar):
        try:
            value = value.as_py()
        except UnicodeDecodeError:
            return "a string that is not UTF-8"
    return f"{value.__class__.__name__} {str(value)[:40]!r}"
