"""JSONL, CSV and TSV, plain or compressed, read in byte ranges that text_scan.py cuts.

Offsets count decompressed bytes, so one mechanism serves all: seek, read, check the hash, parse. A
compressed file is decompressed from where the last shard ended, or from its start.

CSV is RFC 4180 with a header (quoted line breaks are fine). TSV with a header is the same with
tabs; TSV without one is MS MARCO's `pid<TAB>text`, no quoting.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import fsspec
import xxhash

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import (
    ID_FIELDS,
    TEXT_FIELDS,
    FieldOptions,
    Fields,
    file_format,
    fsspec_options,
)

SAMPLE_RECORDS = 100
BOM = b"\xef\xbb\xbf"
csv.field_size_limit(sys.maxsize)  # the default refuses fields over 128 KB


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of rows of one file.

    Attributes:
        start: first decompressed byte (text) or row (Parquet, Lance).
        length: in bytes (text) or rows.
        first_line: line of `start`, from 1 (row number in Parquet and Lance).
        num_rows: records in it, blank lines not counted.
        content: hex hash of what was planned.
        columns: of a CSV or TSV file, in its order; empty elsewhere.
        version: of a Lance table; 0 elsewhere.
    """

    start: int
    length: int
    first_line: int
    num_rows: int
    content: str
    columns: tuple[str, ...] = ()
    version: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes of one record, how many lines they are, and its cells (None: parse the bytes)."""

    raw: bytes
    num_lines: int
    cells: list[str] | None


class TextFile:
    """An open file, read slice after slice."""

    def __init__(self, path: str, storage_options: dict[str, str] | None) -> None:
        self.path = path
        self._storage_options = storage_options
        self._stream: Any = None

    def read(self, rows: Slice, fields: Fields) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield (line, record) of a slice; a record that cannot be parsed is its reason.

        Raises:
            InputError: the bytes are not those that were planned.
        """
        try:
            if self._stream is None or self._stream.tell() > rows.start:
                self.close()
                self._stream = open_text(self.path, self._storage_options)
            self._stream.seek(rows.start)
            raw = self._stream.read(rows.length)
        except (OSError, EOFError) as error:
            raise InputError(f"cannot read {self.path}: {error}") from error
        if xxhash.xxh3_128_hexdigest(raw) != rows.content:
            raise InputError(
                f"{self.path} changed after it was planned (line {rows.first_line} and after): "
                "encode it into a new table"
            )
        yield from parse_all(io.BytesIO(raw), rows.columns, self.path, rows.first_line)

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


open_file = TextFile


def detect(
    path: str, options: FieldOptions, storage_options: dict[str, str] | None
) -> tuple[Fields, tuple[str, ...], Record | None]:
    """Return the fields, the columns (empty for JSONL) and the header record to skip.

    Raises:
        InputError: the file cannot be read or decompressed, or has no id or text field.
    """
    try:
        with open_text(path, storage_options) as stream:
            return _detect(path, stream, options)
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def _detect(
    path: str, stream: Any, options: FieldOptions
) -> tuple[Fields, tuple[str, ...], Record | None]:
    if file_format(path) == "jsonl":
        names: dict[str, None] = {}
        parsed = 0
        for raw in islice((r for r in stream if r.strip()), SAMPLE_RECORDS):
            record = _parse(Record(raw, 1, None), ())
            if isinstance(record, dict):
                names.update(dict.fromkeys(record))
                parsed += 1
        return (options.detect(names, path) if parsed else Fields("id", "text")), (), None
    first = next(records(iter(stream), ("?",), path, quoted=True), None)
    if first is None or first.cells is None:
        return Fields("id", "text"), (), None
    cells = [cell.removeprefix("\ufeff") for cell in first.cells]
    wanted = (options.id, *ID_FIELDS), (options.text, *TEXT_FIELDS)
    if all(any(cell in names for cell in cells) for names in wanted):
        return options.detect(cells, path), tuple(cells), first
    if file_format(path) == "tsv" and len(cells) == 2 and not (options.id or options.text):
        return Fields("0", "1"), ("0", "1"), None
    return options.detect(cells, path), tuple(cells), first


def records(
    lines: Iterator[bytes], columns: tuple[str, ...], path: str, *, quoted: bool | None = None
) -> Iterator[Record]:
    """Cut lines into records: a line each, or as the quoting of CSV says."""
    if is_plain(columns) and not quoted:
        for raw in lines:
            yield Record(raw, 1, None)
        return
    read: list[bytes] = []

    def feed() -> Iterator[str]:
        for raw in lines:
            read.append(raw)
            yield raw.decode("utf-8", "surrogateescape")

    delimiter = "\t" if file_format(path) == "tsv" else ","
    for cells in csv.reader(feed(), delimiter=delimiter):
        yield Record(b"".join(read), len(read), cells)
        read.clear()


def parse_all(
    lines: Iterable[bytes], columns: tuple[str, ...], path: str, line: int = 1
) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield (line, record) of whole records; one that cannot be parsed is its reason."""
    for record in records(iter(lines), columns, path):
        if record.raw.strip():
            yield line, _parse(record, columns)
        line += record.num_lines


def is_plain(columns: tuple[str, ...]) -> bool:
    """Whether each line is a record: JSONL, and TSV without a header. Else quotes decide."""
    return not columns or columns == ("0", "1")


def _parse(record: Record, columns: tuple[str, ...]) -> dict[str, Any] | str:
    """Return the fields of a record, or the reason it has none."""
    cells = record.cells
    if cells is None:
        try:
            text = record.raw.removeprefix(BOM).decode()
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


def open_text(path: str, storage_options: dict[str, str] | None) -> Any:
    """Open a text file as a stream of decompressed bytes."""
    options = fsspec_options(path, storage_options)
    return fsspec.open(path, "rb", compression="infer", **options).open()
