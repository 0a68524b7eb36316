"""JSONL, CSV and TSV: from lines to rows. All that is decided about a text file is decided here.

CSV follows RFC 4180 with a header (quoted line breaks are fine). TSV with a header is the same with
tabs; TSV without one is MS MARCO's `pid<TAB>text`, without quoting. Columns stand for the dialect:
none for JSONL, "0" and "1" for MS MARCO's, the header's names for the others.

Does not know shards: `text_scan` cuts a file into them.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pipeline.corpus.access import open_text, readable
from pipeline.corpus.inputs import InputFile
from pipeline.corpus.passages import ID_FIELDS, TEXT_FIELDS, FieldOptions, Fields, RawRow

SAMPLE_RECORDS = 100
"""Number of records of a JSONL file that are looked at for the names of its fields."""
WITHOUT_HEADER = ("0", "1")
BOM = b"\xef\xbb\xbf"
csv.field_size_limit(sys.maxsize)  # the default refuses fields over 128 KB

Record = tuple[bytes, list[str] | None]
"""The bytes of one record, and its cells (None: parse the bytes)."""


def detect(
    file: InputFile, options: FieldOptions, storage_options: dict[str, str] | None
) -> tuple[Fields, tuple[str, ...], bytes]:
    """Return the fields, the columns (empty for JSONL) and the header to skip (mostly empty).

    Raises:
        InputError: If the file cannot be read or decompressed, or has no id or text field.
    """
    with readable(file.path), open_text(file.path, storage_options) as stream:
        if file.format == "jsonl":
            return _detect_json(file.path, stream, options), (), b""
        return _detect_cells(file, stream, options)


def _detect_json(path: str, stream: Any, options: FieldOptions) -> Fields:
    sample = islice((line for line in stream if line.strip()), SAMPLE_RECORDS)
    parsed = [row for line in sample if isinstance(row := _parse(line, None, ()), dict)]
    # A file without a usable record is no error yet: each of its rows is rejected with its line.
    names = dict.fromkeys(name for row in parsed for name in row)
    return options.detect(names, path) if parsed else Fields("id", "text")


def _detect_cells(
    file: InputFile, stream: Any, options: FieldOptions
) -> tuple[Fields, tuple[str, ...], bytes]:
    header, first = next(records(iter(stream), ("?",), file.format), (b"", None))
    if first is None:
        return Fields("id", "text"), (), b""
    cells = [cell.removeprefix("\ufeff") for cell in first]
    wanted = (options.id, *ID_FIELDS), (options.text, *TEXT_FIELDS)
    is_header = all(any(cell in names for cell in cells) for names in wanted)
    named = options.id or options.text
    if file.format == "tsv" and len(cells) == 2 and not is_header and not named:
        return Fields(*WITHOUT_HEADER), WITHOUT_HEADER, b""
    return options.detect(cells, file.path), tuple(cells), header


def is_plain(columns: tuple[str, ...]) -> bool:
    """Return whether each line is a record: JSONL, and TSV without a header. Else quotes decide."""
    return not columns or columns == WITHOUT_HEADER


def records(lines: Iterator[bytes], columns: tuple[str, ...], format: str) -> Iterator[Record]:
    """Cut lines into records: each line is one, or the quoting of CSV decides."""
    if is_plain(columns):
        for raw in lines:
            yield raw, None
        return
    read: list[bytes] = []

    def feed() -> Iterator[str]:
        for raw in lines:
            read.append(raw)
            yield raw.decode("utf-8", "surrogateescape")

    delimiter = "\t" if format == "tsv" else ","
    for cells in csv.reader(feed(), delimiter=delimiter):
        yield b"".join(read), cells
        read.clear()


def parse_all(
    lines: Iterable[bytes], columns: tuple[str, ...], format: str, line: int = 1
) -> Iterator[tuple[int, RawRow]]:
    """Yield (line, row) of whole records, numbered from `line`; blank lines are left out."""
    for raw, cells in records(iter(lines), columns, format):
        if raw.strip():
            yield line, _parse(raw, cells, columns)
        line += raw.count(b"\n")


def _parse(raw: bytes, cells: list[str] | None, columns: tuple[str, ...]) -> RawRow:
    if cells is None:
        try:
            text = raw.removeprefix(BOM).decode()
        except UnicodeDecodeError as error:
            return f"not UTF-8: {error.reason} at byte {error.start}"
        if not columns:
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                return f"not JSON: {error}"
            return value if isinstance(value, dict) else f"a JSON {type(value).__name__}, no object"
        cells = text.rstrip("\r\n").split("\t")
    if len(cells) != len(columns):
        return f"{len(cells)} columns instead of {len(columns)}"
    return dict(zip(columns, cells, strict=True))
