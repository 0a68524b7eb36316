"""Finds where records end in megabytes of quoted CSV at once, if every quote is where it belongs.

By RFC 4180 a quote opens a cell behind a delimiter or a line break, closes it before one, or is one
of a pair within a cell. Where all are so, a line break ends a record if an even number of quotes
stands before it. Where one is not, `cells` looks record by record at what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pipeline.corpus.cells import BOM, Cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

NEWLINE, RETURN, QUOTE, BACKSLASH = b'\n\r"\\'


def record_starts(raw: bytes, cells: Cells, *, is_start: bool) -> NDArray[np.int64] | None:
    """Return where records begin, and where the last whole one ends.

    Args:
        raw: Lines from the start of a record on.
        cells: How the file is read.
        is_start: Whether this is the start of the file, where a byte order mark may be.

    Returns:
        (n + 1,) offsets; None if quotes or columns are not as they should be, or no record ends.
    """
    characters = np.frombuffer(raw, np.uint8)
    quotes = np.flatnonzero(characters == QUOTE)
    lines = np.flatnonzero(characters == NEWLINE) + 1
    if not raw.endswith(b"\n"):
        lines = np.append(lines, len(raw))
    ends = lines[np.searchsorted(quotes, lines) % 2 == 0]
    if not len(ends):
        return None
    quotes = quotes[: np.searchsorted(quotes, ends[-1])]
    first = len(BOM) if is_start and raw.startswith(BOM) else 0
    if not all_belong(characters, quotes, cells.delimiter, first):
        return None
    starts = np.concatenate([[0], ends])
    spans = np.diff(np.searchsorted(lines, starts, "right")) > 1
    if spans.any():
        if cells.quoting == "csv" and (characters[quotes - 1] == BACKSLASH).any():
            return None
        delimiters = np.flatnonzero(characters == ord(cells.delimiter))
        outside = delimiters[np.searchsorted(quotes, delimiters) % 2 == 0]
        num_cells = np.diff(np.searchsorted(outside, starts)) + 1
        if (num_cells[spans] != len(cells.columns)).any():
            return None
    return starts


def all_belong(
    characters: NDArray[np.uint8], quotes: NDArray[np.int64], delimiter: str, first: int = 0
) -> bool:
    """Return whether quotes open and close cells in turn, and no backslash stands before one.

    Args:
        characters: (n,) the characters.
        quotes: Where the quotes are, of which the first opens a cell.
        delimiter: Character between two cells.
        first: Where the first record begins.
    """
    if not len(quotes):
        return True
    if len(quotes) % 2:
        return False
    around = np.concatenate([[NEWLINE], characters, [NEWLINE, NEWLINE]])  # shifted by one
    opening, closing = quotes[::2], quotes[1::2]
    before, after, behind = around[opening], around[closing + 2], around[closing + 3]
    opens = np.isin(before, [ord(delimiter), NEWLINE, QUOTE]) | (opening == first)
    ends_line = (after == NEWLINE) | ((after == RETURN) & (behind == NEWLINE))
    closes = (after == ord(delimiter)) | (after == QUOTE) | ends_line
    escaped = (around[closing] == BACKSLASH) & (after != QUOTE)
    return bool(opens.all() and closes.all() and not escaped.any())
