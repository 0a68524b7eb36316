"""JSONL, CSV and TSV: from records to rows.

Does not know shards: `text_scan` cuts a file into them. How a file is read is decided once, by
`text_detect`; `Cells` says it for CSV and TSV, and None stands for JSONL.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from pipeline.corpus.cells import (
    BOM,
    MAX_RECORD_BYTES,
    Cells,
    Record,
    quoted_records,
    split_line,
)
from pipeline.corpus.passages import RawRow

BLANK = b" \t\n\r\v\f"
"""Characters of a blank line, which is no row. In CSV and TSV the delimiter makes it one."""


def blank_characters(cells: Cells | None) -> bytes:
    """Return the characters that a line may have and still be blank."""
    return BLANK.replace(cells.delimiter.encode(), b"") if cells else BLANK


def records(
    lines: Iterator[bytes],
    cells: Cells | None,
    path: str,
    line: int = 1,
    limit: int = MAX_RECORD_BYTES,
) -> Iterator[Record]:
    """Cut lines, of which the first has the number `line`, into records of at most `limit` bytes.

    Raises:
        InputError: If quotes do not tell where a record ends.
    """
    if cells is None or not cells.spans_lines:
        return ((raw, None) for raw in lines)
    return quoted_records(lines, cells, path, line, limit)


def parse_all(
    lines: Iterable[bytes], cells: Cells | None, path: str, line: int = 1
) -> Iterator[tuple[int, RawRow]]:
    """Yield (line, row) of whole records, numbered from `line`; blank lines are left out."""
    blank = blank_characters(cells)
    for raw, found in records(iter(lines), cells, path, line):
        if raw.strip(blank):
            yield line, parse_json(raw) if cells is None else _parse_cells(raw, found, cells, line)
        line += raw.count(b"\n")


class _Repeating(dict[str, Any]):
    """An object in which a key is there twice: which value counts nobody can say."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Repeating(row)


def parse_json(raw: bytes) -> RawRow:
    """Return the row of a line of JSONL, or why it is none."""
    text = _decoded(raw.removeprefix(BOM))
    if isinstance(text, UnicodeDecodeError):
        return _not_utf8(text)
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if isinstance(value, _Repeating):
        return "a JSON object that has a key twice"
    return value if isinstance(value, dict) else f"a JSON {type(value).__name__}, no object"


def _parse_cells(raw: bytes, found: list[str] | str | None, cells: Cells, line: int) -> RawRow:
    if found is None:
        text = _decoded(raw.removeprefix(BOM) if line == 1 else raw)
        if isinstance(text, UnicodeDecodeError):
            return _not_utf8(text)
        found = split_line(text, cells)
    if isinstance(found, str):
        return found
    if len(found) != len(cells.columns):
        reason = f"{len(found)} columns instead of {len(cells.columns)}"
        # A break inside a cell without quotes leaves the line before complete, as far as it goes.
        rest = "; if it is the rest of the row before it, that row is in the table without it"
        return reason + rest if len(found) < len(cells.columns) else reason
    if cells.no_cr and _ends_in_cr(raw, cells):
        return "a carriage return ends the line, but not the first line: let all lines end alike"
    if cells.header and tuple(found) == cells.columns:
        return "the header once more"
    return dict(zip(cells.columns, found, strict=True))


def _ends_in_cr(raw: bytes, cells: Cells) -> bool:
    """Return whether a carriage return ends a line, and does not stand behind a quoted cell."""
    body = raw.removesuffix(b"\n")
    return body.endswith(b"\r") and (
        cells.quoting == "none" or not body.rstrip(b"\r").endswith(b'"')
    )


def _decoded(raw: bytes) -> str | UnicodeDecodeError:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return error


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: {error.reason} at byte {error.start}"
