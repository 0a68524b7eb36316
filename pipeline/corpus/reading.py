"""Says how files are read, and which options choose another reading."""

from __future__ import annotations

from collections.abc import Iterable

from pipeline.corpus.cells import Cells
from pipeline.corpus.passages import Fields, shown_names
from pipeline.corpus.text_detect import WITHOUT_HEADER

SHOWN_READINGS = 5
QUOTES = {
    "none": "quotes are ordinary characters (--quoting if cells are quoted)",
    "line": "a quoted cell ends in its line (--quoting if it may span lines, --no-quoting if "
    "quotes are ordinary characters)",
    "csv": "quoted cells may span lines (--no-quoting if quotes are ordinary characters)",
    "rfc4180": "cells are quoted as RFC 4180 says (--no-quoting if quotes are ordinary characters)",
}
"""What `Cells.quoting` means."""


def readings(files: Iterable[tuple[str, Fields, Cells | None]]) -> list[str]:
    """Return a line for each way in which some of the files (path, fields, cells) are read."""
    ways: dict[tuple[Fields, Cells | None], dict[str, None]] = {}
    for path, fields, cells in files:
        ways.setdefault((fields, cells), {})[path] = None
    lines = []
    for (fields, cells), paths in ways.items():
        more = f" and {len(paths) - 1:,} more" if len(paths) > 1 else ""
        lines.append(f"{next(iter(paths))}{more}: {_reading(fields, cells)}")
    if len(lines) > SHOWN_READINGS:
        lines[SHOWN_READINGS:] = [f"{len(lines) - SHOWN_READINGS:,} more ways of reading"]
    return lines


def _reading(fields: Fields, cells: Cells | None) -> str:
    title = fields.title or ("title where a row has one" if cells is None else "nowhere")
    names = f"id from {fields.id}, text from {fields.text}, title from {title}"
    if fields.keep:
        names += ", metadata from " + ", ".join(f"{name} ({type})" for name, type in fields.keep)
    names += " (others: --id-field, --text-field, --title-field)"
    if cells is None:
        return names
    if cells.header:
        return f"the first line is the header; {names}; {QUOTES[cells.quoting]}"
    if cells.columns == WITHOUT_HEADER:
        names = "the columns are id and text (--id-field and --text-field if the line is a header)"
    else:
        names = f"the columns are {shown_names(cells.columns)}; {names}"
    return f"the first line is a row; {names}; {QUOTES[cells.quoting]}"
