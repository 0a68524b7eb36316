"""CSV and TSV: from lines to cells. All that is decided about quotes and line ends is decided here.

A file is read in one of four ways, see `Cells.quoting`. A line that does not fit its way of reading
is a reject; where rows after it may be parts of it, the file is refused, and the error says which
option reads it.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from kalm_encoder.errors import InputError

MAX_RECORD_BYTES = 64 << 20
"""A quoted cell that does not end within so much was never meant as one. A passage of 10 million
characters, the longest that is encoded, fits in."""
BOM = b"\xef\xbb\xbf"
LONE_CR = "\ud800"
"""Stands for a carriage return within a line while `csv` reads it, which refuses one outside of
quotes. No decoded text holds this character."""
MIXED = "a quote in a cell without quotes, beside a quoted cell"
csv.field_size_limit(sys.maxsize)  # the default refuses fields over 128 KB


@dataclass(frozen=True, slots=True)
class Cells:
    """How the lines of a CSV or TSV file become cells.

    Attributes:
        columns: Names of the columns, in the order of the file.
        delimiter: Character between two cells.
        quoting: What a quote means at the start of a cell. "none": it is an ordinary character.
            "line": the cell is quoted and ends in its line. "csv": the cell is quoted and may span
            lines; one that ends in a backslash is refused. "rfc4180": the same, and a backslash is
            an ordinary character.
        header: Whether the names come from the first line of the file.
        no_cr: Whether a carriage return before the end of a line makes it a reject: it would be
            part of an id or a title, and the first line ends without one.
    """

    columns: tuple[str, ...]
    delimiter: str = "\t"
    quoting: str = "none"
    header: bool = False
    no_cr: bool = False

    @property
    def spans_lines(self) -> bool:
        """Whether only quotes tell where a record ends."""
        return self.quoting in ("csv", "rfc4180")


Record = tuple[bytes, list[str] | str | None]
"""The bytes of one record, and its cells, or why it has none (None: the bytes are not parsed)."""


def quoted_records(
    lines: Iterator[bytes], cells: Cells, path: str, line: int, limit: int = MAX_RECORD_BYTES
) -> Iterator[Record]:
    """Cut lines into records where quoted cells may span lines.

    Args:
        lines: Lines of the file.
        cells: How they are read.
        path: Path of the file, for errors.
        line: Number of the first of the lines; a byte order mark is dropped in line 1.
        limit: Most bytes of one record.

    Raises:
        InputError: If quotes do not tell where a record ends.
    """
    read: list[bytes] = []
    size = 0

    def feed() -> Iterator[str]:
        nonlocal size
        for raw in lines:
            read.append(raw)
            text = raw.decode("utf-8", "surrogateescape")
            if len(read) > 1:
                size += len(raw)
                if size > limit:
                    raise InputError(_unclosed(path, line, f"does not end within {limit:,} bytes"))
            elif line == 1:
                text = text.removeprefix("\ufeff")
            yield _shielded(text) if "\r" in text else text

    reader = csv.reader(feed(), delimiter=cells.delimiter, strict=True)
    while True:
        found: list[str] | str
        try:
            found = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if len(read) > 1:
                what = f"ends in line {line + len(read) - 1} with text behind its closing quote"
                if _is_open(error):
                    what = "is never closed"
                raise InputError(_unclosed(path, line, what)) from error
            if cells.quoting == "csv" and _goes_on_if_escaped(read[0]):
                raise _escapes(path, line) from error
            found = _malformed(error)
        raw = read[0] if len(read) == 1 else b"".join(read)
        if not isinstance(found, str):
            if b"\r" in raw:
                found = [cell.replace(LONE_CR, "\r") for cell in found]
            num_cells = len(found)
            if b'"' in raw and (b'\\"' in raw or '"' in "".join(found)):
                found = _checked(found, raw, cells, path, line)
            if len(read) > 1 and cells.columns and num_cells != len(cells.columns):
                what = f"reaches to line {line + len(read) - 1}, and the row lacks columns then"
                raise InputError(_unclosed(path, line, what))
        yield raw, found
        line += len(read)
        size = 0
        read.clear()


def split_line(text: str, cells: Cells) -> list[str] | str:
    """Return the cells of one line, or why it has none."""
    if cells.quoting == "none" or '"' not in text:
        return text.rstrip("\r\n").split(cells.delimiter)
    try:
        (found,) = csv.reader([_shielded(text)], delimiter=cells.delimiter, strict=True)
    except csv.Error as error:
        return _malformed(error)
    found = [cell.replace(LONE_CR, "\r") for cell in found]
    return MIXED if _is_mixed(found, text) else found


def check_quotes(lines: list[tuple[int, str]], cells: Cells, path: str) -> None:
    """Refuse a line whose quotes cannot be those of cells that end in it.

    Args:
        lines: Numbers of lines, and the lines, of which the encoding does not matter.
        cells: How they are read.
        path: Path of the file, for errors.

    Raises:
        InputError: If a quoted cell does not end in its line, or has text behind its closing quote.
    """
    texts = [_shielded(text) for _, text in lines]
    try:
        found = list(csv.reader(texts, delimiter=cells.delimiter, strict=True))
    except csv.Error:
        found = []
    if len(found) == len(texts) and not any(map(_is_doubtful, found, texts)):
        return
    for line, text in lines:  # to find the line that is at fault
        alone = split_line(text, cells)
        if isinstance(alone, str) or _may_be_escaped(alone, text):
            reason = alone if isinstance(alone, str) else "a backslash may escape a quote"
            raise InputError(
                f"{path} line {line}: {reason}. Give --no-quoting if quotes are ordinary "
                "characters in this file, or --quoting if its cells are quoted as RFC 4180 says "
                "and may span lines"
            )


def _is_doubtful(found: list[str], text: str) -> bool:
    return _may_be_escaped(found, text) or _is_mixed(found, text)


def _checked(found: list[str], raw: bytes, cells: Cells, path: str, line: int) -> list[str] | str:
    """Return the cells of a record that has quotes, or why they cannot be what was meant.

    Raises:
        InputError: If backslashes may escape quotes, so that rows may end elsewhere.
    """
    text = raw.decode("utf-8", "surrogateescape")
    if cells.quoting == "csv" and (_may_be_escaped(found, text) or _may_end_earlier(text)):
        raise _escapes(path, line)
    return MIXED if _is_mixed(found, text) else found


def _escapes(path: str, line: int) -> InputError:
    return InputError(
        f"{path} line {line}: a backslash stands before the closing quote of a cell, or before "
        "a quote of a cell without quotes or over several lines. Give --quoting if backslashes "
        "are ordinary characters. If they escape quotes, as Spark writes CSV by default, write "
        'the file again with quotes doubled: option("escape", \'"\')'
    )


def _is_mixed(found: list[str], text: str) -> bool:
    """Return whether a line has quoted cells and also a quote in a cell that is not quoted."""
    bare = _bare(found, text)
    return bool(bare) and sum(cell.count('"') for cell in bare) < text.count('"')


def _may_be_escaped(found: list[str], text: str) -> bool:
    """Return whether a quote may be one that a backslash escapes."""
    if '\\"' not in text:
        return False
    bare = any('\\"' in cell for cell in _bare(found, text))
    return bare or any(cell.endswith("\\") and _quoted(cell) in text for cell in found)


def _may_end_earlier(text: str) -> bool:
    """Return whether a record over several lines would be one line if backslashes escape quotes."""
    return '\\""' in text and "\n" in text.rstrip("\r\n")


def _goes_on_if_escaped(raw: bytes) -> bool:
    """Return whether a line ends within a quoted cell if backslashes escape quotes.

    Some writers escape backslashes as well, and Spark does not.
    """
    if b'\\"' not in raw:
        return False
    readings = re.sub(rb"\\.", b"", raw), raw.replace(b'\\"', b"")
    return any(rest.count(b'"') % 2 for rest in readings)


def _bare(found: list[str], text: str) -> list[str]:
    """Return the cells of a record that have a quote and are not quoted."""
    with_quotes = [cell for cell in found if '"' in cell]
    return [cell for cell in with_quotes if _quoted(cell) not in text]


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'


def _shielded(text: str) -> str:
    """Replace the carriage returns that do not end a line."""
    if "\r" not in text:
        return text
    body = text.rstrip("\r\n")
    return body.replace("\r", LONE_CR) + text[len(body) :]


def _malformed(error: csv.Error) -> str:
    if _is_open(error):
        return "a quoted cell does not end in its line"
    return "a quoted cell has text behind its closing quote"


def _is_open(error: csv.Error) -> bool:
    return "unexpected end" in str(error)


def _unclosed(path: str, line: int, what: str) -> str:
    return (
        f"{path} line {line}: a quoted cell that begins here {what}. Mend the line, or give "
        "--no-quoting if quotes are ordinary characters in this file"
    )
