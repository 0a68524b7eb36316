"""Says what an id is: a string, or the decimal string of an integer, as at encoding."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc

from kalm_encoder.errors import InputError

Id = str | int
"""An id as a caller may give it."""


def as_id(value: object) -> str:
    """Return an id as the table holds it.

    Raises:
        InputError: The value is neither a string nor an integer, or it is not valid Unicode.
    """
    kind = type(value).__name__
    if isinstance(value, Integral) and kind != "bool":
        return str(int(value))
    if isinstance(value, UUID):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{value!r} ({kind}) is not an id: give a string or an integer")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InputError(f"the id {value!r} is not valid Unicode: no table holds it") from None
    return value


def as_ids(values: Iterable[object]) -> list[str]:
    """Return ids as the table holds them, in their order.

    Raises:
        InputError: One of them is no id, or a single string was given instead of a list.
    """
    if isinstance(values, str):
        raise InputError(f"ids is one string, {values!r}: give a list of ids, such as [{values!r}]")
    return [as_id(value) for value in values]


def ids_in(ids: Iterable[object]) -> pc.Expression:
    """Return a filter for rows with these ids. As an expression it is safe for any id."""
    return pc.field("id").isin(pa.array(as_ids(ids), pa.string()))
