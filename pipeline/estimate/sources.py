"""Cuts the files of each format into blocks: runs of records that an estimate samples.

A block can be read alone, and each record is in exactly one block, so long records are drawn no
more often than short ones. A line belongs to the block that holds the line break before it.
Compressed files, and CSV whose quotes may hide line breaks, can only be read from their start: for
them, reading a block means reading on.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import fsspec

from pipeline.corpus import text
from pipeline.corpus.access import (
    compression_of,
    decompressed,
    open_store,
    open_text,
    readable,
)
from pipeline.corpus.cells import Cells
from pipeline.corpus.columnar import LanceTable, ParquetFile
from pipeline.corpus.inputs import InputFile
from pipeline.corpus.passages import FieldOptions, Fields, RawRow
from pipeline.corpus.scans import open_file
from pipeline.corpus.text_detect import detect

READ_AHEAD_BYTES = 1 << 16
"""Limits what one request fetches from an object store beyond the block."""
MAX_READ_BYTES = 1 << 10
"""Limits what a decompressor takes at once, so that it is never far ahead of what it hands out."""
WARM_UP_BYTES, MEASURED_BYTES = 1 << 18, 1 << 20
"""Text at the start of a compressed file, where the compressor knows little yet and packs worse,
and the text after it by which the rest of the file is judged."""
ROW_BYTES = 500
"""Text that a row of columns is taken to hold. It is a guess: a wrong one widens the intervals of a
corpus that also has text files, but does not bias them."""

Block = tuple[float, Iterable[tuple[int, RawRow]]]
"""The share of its source that a block is, and its (line, row) pairs."""


@dataclass(frozen=True)
class BlockSource:
    """A file, or a row group of one, that is read in blocks.

    Attributes:
        path: Path or URL of the file.
        fields: Where the passages are in the file.
        size: Bytes of text in it, as far as they are known without reading it.
        read: Reads a block: `read(k, n)` returns block k of n equal ones.
        cells: How a CSV or TSV file is read; None elsewhere.
        in_order: Whether `read` can only return the next block, whatever k is.
        stands_for: Number of files, with itself, that it stands for in the sample.
    """

    path: str
    fields: Fields
    size: float
    read: Callable[[int, int], Block]
    cells: Cells | None = None
    in_order: bool = False
    stands_for: float = 1.0


def open_sources(
    file: InputFile, options: FieldOptions, storage_options: dict[str, str] | None
) -> list[BlockSource]:
    """Return what a corpus file can be sampled from: each row group, or the whole file.

    Raises:
        InputError: If the file cannot be read, or if it has no id or text field.
    """
    opened = open_file(file, storage_options)
    if isinstance(opened, ParquetFile | LanceTable):
        fields, reopen = opened.choose_fields(options), partial(type(opened), file, storage_options)

        def read(first: int, last: int, k: int, n: int) -> Block:
            start = first + (last - first) * k // n
            end = first + (last - first) * (k + 1) // n
            again = reopen()  # a corpus may have more files than can be open at once
            rows = again.row_range(start, end - start)
            return rows.num_rows / (last - first), again.read(rows, fields)

        return [
            BlockSource(file.path, fields, (last - first) * ROW_BYTES, partial(read, first, last))
            for first, last in pairwise(opened.bounds)
        ]
    return [_text_file(file, options, storage_options)]


def _text_file(
    file: InputFile, options: FieldOptions, storage_options: dict[str, str] | None
) -> BlockSource:
    fields, cells, header = detect(file, options, storage_options)
    first_line = 1 + header.count(b"\n")
    path = file.path
    with readable(path):
        fs, inner = open_store(path, storage_options)
        size = int(fs.size(inner))
        with fs.open(inner, "rb") as raw:
            compression = compression_of(raw, path)
            text_size = _text_bytes(raw, size, compression)
    if not (compression or file.is_packed) and not (cells and cells.spans_lines):

        def read(k: int, n: int) -> Block:
            begin, end = size * k // n, size * (k + 1) // n
            with readable(path), fs.open(inner, "rb", block_size=READ_AHEAD_BYTES) as stream:
                raw = fsspec.utils.read_block(stream, begin, end - begin, b"\n")
            rows, line = (raw[len(header) :], first_line) if k == 0 else (raw, first_line + 1)
            return len(raw) / size, text.parse_all(io.BytesIO(rows), cells, path, line)

        return BlockSource(path, fields, size, read, cells)
    records = _records(path, cells, header, storage_options)
    drawn = taken = 0

    def read_on(_: int, n: int) -> Block:
        nonlocal drawn, taken
        drawn, before, lines = drawn + 1, taken, []
        target = math.inf if drawn == n else text_size * drawn / n
        while taken < target and (record := next(records, None)):
            lines.append(record)
            taken += len(record)
        line = first_line if drawn == 1 else first_line + 1
        return (taken - before) / text_size, text.parse_all(lines, cells, path, line)

    return BlockSource(path, fields, text_size, read_on, cells, in_order=True)


def _text_bytes(raw: Any, size: int, compression: str | None) -> float:
    """Return the bytes of text in a file: exact if it is small or not compressed."""
    if compression is None:
        return size
    little = SimpleNamespace(read=lambda size: raw.read(min(size, MAX_READ_BYTES)))
    stream = decompressed(little, compression)
    warm_up = len(stream.read(WARM_UP_BYTES))
    begin = int(raw.tell())
    measured = len(stream.read(MEASURED_BYTES))
    if measured < MEASURED_BYTES:
        return warm_up + measured
    taken = max(1, int(raw.tell()) - begin)  # one read may hold text without end
    return warm_up + (size - begin) * measured / taken


def _records(
    path: str, cells: Cells | None, header: bytes, storage_options: dict[str, str] | None
) -> Iterator[bytes]:
    with readable(path), open_text(path, storage_options) as stream:
        stream.read(len(header))
        line = 1 + header.count(b"\n")
        for raw, _ in text.records(iter(stream), cells, path, line):
            yield raw
