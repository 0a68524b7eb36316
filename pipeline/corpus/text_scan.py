"""Ranges of a text file: cut in one read of it, and read again one by one.

Offsets count decompressed bytes, so that one mechanism serves all: seek, read, check the hash,
parse. A compressed file is decompressed from where the last range ended, or from its start.

Where each line is a record, a few megabytes are cut at a time. There is no Python object per line,
and reading, decompressing, searching and hashing all run without the interpreter lock, so that
threads scan several files at once. Quoted CSV is read record by record. No library does this: what
reads JSON or CSV in blocks gives no byte offsets and fails at the first bad row.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kalm_encoder.errors import InputError
from pipeline.corpus.access import open_text, readable
from pipeline.corpus.cells import Cells, Record, check_quotes
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import FieldOptions, Fields, RawRow
from pipeline.corpus.quotes import NEWLINE, QUOTE, all_belong, record_starts
from pipeline.corpus.text import (
    BLANK,
    blank_characters,
    parse_all,
    records,
)
from pipeline.corpus.text_detect import detect

if TYPE_CHECKING:
    from numpy.typing import NDArray

READ_BYTES = 4 << 20
"""Number of bytes read and cut at once: enough for NumPy to pay off, little beside a model."""
RECORDS_AT_ONCE = 64
TAB = ord("\t")

Chunk = tuple[bytes, "NDArray[np.int64]", "NDArray[np.bool_]"]
"""Whole records that were read at once: their bytes; (n + 1,) where each record begins in them, and
their length; (n,) whether the record counts, which blank lines do not."""


class TextFile:
    """A text file, cut into ranges and read range after range."""

    def __init__(self, file: InputFile, storage_options: dict[str, str] | None) -> None:
        self.file, self.path = file, file.path
        self._storage_options = storage_options
        self._stream: Any = None

    def scan(
        self, shard_size: int, max_rows: int | None, options: FieldOptions
    ) -> tuple[Fields, list[RowRange]]:
        """Choose the fields and cut the file into ranges, reading it once.

        Raises:
            InputError: If the file cannot be read or decompressed, has no id or text field, or if
                its quotes do not tell where rows end.
        """
        fields, cells, header = detect(self.file, options, self._storage_options)
        first_line = 1 + header.count(b"\n")
        with readable(self.path), open_text(self.path, self._storage_options) as stream:
            stream.read(len(header))
            blank = blank_characters(cells)
            if cells and cells.spans_lines:
                chunks = quoted_chunks(stream, cells, self.path, first_line)
            else:
                chunks = line_chunks(stream, blank=blank)
            if cells and cells.quoting == "line":
                chunks = quotes_checked(chunks, cells, self.path, first_line)
            ranges = cut(
                chunks, len(header), first_line, shard_size, max_rows=max_rows, cells=cells
            )
            return fields, list(ranges)

    def read(self, rows: RowRange, fields: Fields) -> Iterator[tuple[int, RawRow]]:
        """Yield (line, row) of a range.

        Raises:
            InputError: If the bytes are not those that were planned, or cannot be read.
        """
        with readable(self.path):
            if self._stream is not None and self._stream.tell() > rows.start:
                self._stream.close()
                self._stream = None
            if self._stream is None:
                self._stream = open_text(self.path, self._storage_options)
            self._stream.seek(rows.start)
            raw = self._stream.read(rows.length)
        if xxhash.xxh3_128_hexdigest(raw) != rows.content:
            raise InputError(
                f"{self.path} changed after it was planned (line {rows.first_line} and after): "
                "encode it into a new table"
            )
        yield from parse_all(io.BytesIO(raw), rows.cells, self.path, rows.first_line)


def line_chunks(
    stream: Any, size: int = READ_BYTES, blank: bytes = BLANK, length: int | None = None
) -> Iterator[Chunk]:
    """Yield a stream in chunks of about `size` bytes, where each line is a record.

    Args:
        stream: The stream, at the start of a line.
        size: Number of bytes read at once.
        blank: Characters that a blank line may have.
        length: Only the lines that begin within so many bytes are read; None reads all.
    """
    left = sys.maxsize if length is None else length
    while left > 0 and (raw := stream.read(min(size, left))):
        if not raw.endswith(b"\n"):
            raw += stream.readline()
        left -= len(raw)
        ends = np.flatnonzero(np.frombuffer(raw, np.uint8) == NEWLINE) + 1
        rest = [] if raw.endswith(b"\n") else [len(raw)]
        starts = np.concatenate([[0], ends, rest]).astype(np.int64)
        yield raw, starts, _are_rows(raw, starts, blank)


def quoted_chunks(
    stream: Any, cells: Cells, path: str, line: int, size: int = READ_BYTES
) -> Iterator[Chunk]:
    """Yield a stream in chunks of about `size` bytes, where quotes decide what a record is.

    From the first doubtful chunk on, the stream is read record by record.

    Raises:
        InputError: If quotes do not tell where a record ends.
    """
    rest, blank = b"", blank_characters(cells)
    while raw := rest + stream.read(size) + stream.readline():
        starts = record_starts(raw, cells, is_start=line == 1)
        if starts is None:
            lines = chain(io.BytesIO(raw), stream)
            yield from record_chunks(records(lines, cells, path, line), blank)
            return
        yield raw, starts, _are_rows(raw, starts, blank)
        end = int(starts[-1])
        line += raw.count(b"\n", 0, end)
        rest = raw[end:]


def _are_rows(raw: bytes, starts: NDArray[np.int64], blank: bytes) -> NDArray[np.bool_]:
    """Return which records are not blank.

    The first byte tells for most of them; only those that begin with a space are looked at.
    """
    is_blank = np.isin(np.arange(256), np.frombuffer(blank, np.uint8))
    is_row: NDArray[np.bool_] = ~is_blank[np.frombuffer(raw, np.uint8)[starts[:-1]]]
    for i in np.flatnonzero(~is_row):
        is_row[i] = bool(raw[starts[i] : starts[i + 1]].strip(blank))
    return is_row


def record_chunks(found: Iterator[Record], blank: bytes = BLANK) -> Iterator[Chunk]:
    """Yield records in chunks."""
    while batch := [raw for raw, _ in islice(found, RECORDS_AT_ONCE)]:
        starts = np.cumsum([0, *map(len, batch)])
        yield b"".join(batch), starts, np.array([bool(raw.lstrip(blank)) for raw in batch])


def quotes_checked(chunks: Iterable[Chunk], cells: Cells, path: str, line: int) -> Iterator[Chunk]:
    """Pass on chunks of lines, of which the first has the number `line`.

    Raises:
        InputError: If a cell that begins with a quote does not end in its line.
    """
    for raw, starts, is_row in chunks:
        characters = np.frombuffer(raw, np.uint8)
        quotes = np.flatnonzero(characters == QUOTE)
        before = characters[quotes - 1]  # of a first byte this is the last, a line's end or none
        opening = quotes[(quotes == 0) | (before == TAB) | (before == NEWLINE)]
        found = np.unique(np.searchsorted(starts, opening, "right") - 1)
        line_of = np.searchsorted(starts, quotes, "right") - 1
        in_found = np.isin(line_of, found)
        quotes, line_of = quotes[in_found], line_of[in_found]
        even = len(quotes) % 2 == 0 and (line_of[::2] == line_of[1::2]).all()
        if not (even and all_belong(characters, quotes, cells.delimiter)):
            text = raw.decode("latin-1")  # a character per byte
            lines = [(line + int(i), text[starts[i] : starts[i + 1]]) for i in found]
            check_quotes(lines, cells, path)
        yield raw, starts, is_row
        line += len(is_row)


def cut(
    chunks: Iterable[Chunk],
    start: int,
    first_line: int,
    shard_size: int,
    *,
    max_rows: int | None = None,
    cells: Cells | None = None,
) -> Iterator[RowRange]:
    """Cut records into ranges of `shard_size` rows, at most `max_rows` in all.

    A range ends where the first row begins that has no place in it. A blank line stays in the range
    of the row before it.

    Args:
        chunks: Records of a file, in order.
        start: Byte at which the first one begins.
        first_line: Line of that byte.
        shard_size: Rows per range.
        max_rows: Rows in all; None takes all there are.
        cells: How the file is read, noted in each range.
    """
    left = sys.maxsize if max_rows is None else max_rows
    digest, length, num_lines, num_rows = xxhash.xxh3_128(), 0, 0, 0
    for raw, starts, is_row in chunks:
        rows = np.flatnonzero(is_row)
        is_last = len(rows) > left
        end = rows[left] if is_last else len(is_row)
        begins = rows[:left][shard_size - num_rows :: shard_size]  # records that begin a new range
        left -= min(left, len(rows))
        for i, (first, last) in enumerate(pairwise([0, *begins, end])):
            if i > 0:
                yield RowRange(start, length, first_line, num_rows, digest.hexdigest(), cells)
                start, first_line = start + length, first_line + num_lines
                digest, length, num_lines, num_rows = xxhash.xxh3_128(), 0, 0, 0
            begin, stop = int(starts[first]), int(starts[last])
            digest.update(memoryview(raw)[begin:stop])
            length += stop - begin
            num_lines += raw.count(b"\n", begin, stop)
            num_rows += int(is_row[first:last].sum())
        if is_last:
            break
    if num_rows:
        yield RowRange(start, length, first_line, num_rows, digest.hexdigest(), cells)
