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
from pipeline.corpus.columnar import LanceTable, ParquetFile
from pipeline.corpus.inputs import COMPRESSIONS, fsspec_options, readable
from pipeline.corpus.passages import FieldOptions, Fields, RawRow
from pipeline.corpus.shards import open_file

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
        in_order: Whether `read` can only return the next block, whatever k is.
        stands_for: Number of files, with itself, that it stands for in the sample.
    """

    path: str
    fields: Fields
    size: float
    read: Callable[[int, int], Block]
    in_order: bool = False
    stands_for: float = 1.0


def open_sources(
    path: str, options: FieldOptions, storage_options: dict[str, str] | None
) -> list[BlockSource]:
    """Return what a corpus file can be sampled from: each row group, or the whole file.

    Raises:
        InputError: If the file cannot be read, or if it has no id or text field.
    """
    file = open_file(path, storage_options)
    if isinstance(file, ParquetFile | LanceTable):
        fields, reopen = file.choose_fields(options), partial(type(file), path, storage_options)

        def read(first: int, last: int, k: int, n: int) -> Block:
            start = first + (last - first) * k // n
            end = first + (last - first) * (k + 1) // n
            opened = reopen()  # a corpus may have more files than can be open at once
            rows = opened.row_range(start, end - start)
            return rows.num_rows / (last - first), opened.read(rows, fields)

        return [
            BlockSource(path, fields, (last - first) * ROW_BYTES, partial(read, first, last))
            for first, last in pairwise(file.bounds)
        ]
    return [_text_file(path, options, storage_options)]


def _text_file(
    path: str, options: FieldOptions, storage_options: dict[str, str] | None
) -> BlockSource:
    fields, columns, header = text.detect(path, options, storage_options)
    with readable(path):
        fs, inner = fsspec.core.url_to_fs(path, **fsspec_options(path, storage_options))
        size = int(fs.size(inner))
    if not path.endswith(COMPRESSIONS) and text.is_plain(columns):

        def read(k: int, n: int) -> Block:
            begin, end = size * k // n, size * (k + 1) // n
            with readable(path), fs.open(inner, "rb", block_size=READ_AHEAD_BYTES) as stream:
                raw = fsspec.utils.read_block(stream, begin, end - begin, b"\n")
            return len(raw) / size, text.parse_all(io.BytesIO(raw), columns, path)

        return BlockSource(path, fields, size, read)
    with readable(path), fs.open(inner, "rb") as raw:
        text_size = _text_bytes(raw, size, fsspec.utils.infer_compression(path))
    records = _records(path, columns, header, storage_options)
    drawn = taken = 0

    def read_on(_: int, n: int) -> Block:
        nonlocal drawn, taken
        drawn, before, lines = drawn + 1, taken, []
        target = math.inf if drawn == n else text_size * drawn / n
        while taken < target and (record := next(records, None)):
            lines.append(record)
            taken += len(record)
        return (taken - before) / text_size, text.parse_all(lines, columns, path)

    return BlockSource(path, fields, text_size, read_on, in_order=True)


def _text_bytes(raw: Any, size: int, compression: str | None) -> float:
    """Return the bytes of text in a file: exact if it is small or not compressed."""
    if compression is None:
        return size
    little = SimpleNamespace(read=lambda size: raw.read(min(size, MAX_READ_BYTES)))
    stream = fsspec.compression.compr[compression](little, mode="rb")
    warm_up = len(stream.read(WARM_UP_BYTES))
    begin = int(raw.tell())
    measured = len(stream.read(MEASURED_BYTES))
    if measured < MEASURED_BYTES:
        return warm_up + measured
    taken = max(1, int(raw.tell()) - begin)  # one read may hold text without end
    return warm_up + (size - begin) * measured / taken


def _records(
    path: str, columns: tuple[str, ...], header: bytes, storage_options: dict[str, str] | None
) -> Iterator[bytes]:
    with readable(path), text.open_text(path, storage_options) as stream:
        stream.read(len(header))
        for raw, _ in text.records(iter(stream), columns, path):
            yield raw
