"""Blocks of a large text file in which each line is a record, so that many workers can plan it.

A block owns the lines that begin in it. It takes two reads: the first counts the lines and rows of
each block, which tells in which block and at which of its rows each shard begins; the second cuts
in each block the shards that begin there. The last of them may end in a later block. The ranges
are those of one read from the start of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np

from kalm_encoder.errors import InputError
from pipeline.corpus.cells import Cells
from pipeline.corpus.inputs import RowRange
from pipeline.corpus.text import blank_characters
from pipeline.corpus.text_scan import READ_BYTES, Chunk, cut, line_chunks, quotes_checked

SEARCH_BYTES = 64 << 10
"""Bytes that are read at once to find where the first line of a block begins."""


@dataclass(frozen=True, slots=True)
class Count:
    """The lines of a block.

    Attributes:
        start: First byte of its first line.
        num_lines: Number of lines that begin in it.
        num_rows: Number of those that are not blank.
    """

    start: int
    num_lines: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The shards that begin in a block.

    Attributes:
        start: Byte at which a line begins that is not behind the first shard.
        first_line: Number of that line.
        skip: Number of rows from there to the first shard; None if it begins right there, even if
            the line is blank, as the first one of the file does.
        num_shards: Number of shards.
    """

    start: int
    first_line: int
    skip: int | None
    num_shards: int


def bounds_of(start: int, end: int, block_bytes: int) -> list[tuple[int, int]]:
    """Return the blocks (first byte, byte behind the last) of the bytes from `start` to `end`."""
    return list(pairwise([*range(start, end, block_bytes), end]))


def count(stream: Any, start: int, end: int, cells: Cells | None, size: int = READ_BYTES) -> Count:
    """Count the lines that begin at the bytes from `start` to `end` of a file.

    Args:
        stream: The file, which can be read from any byte.
        start: First byte of the block.
        end: The byte behind it.
        cells: How lines become cells; None for JSONL.
        size: Number of bytes read at once.
    """
    first = _first_line(stream, start, end)
    stream.seek(first)
    lines = rows = 0
    for _, _, is_row in line_chunks(stream, size, blank_characters(cells), end - first):
        lines += len(is_row)
        rows += int(is_row.sum())
    return Count(first, lines, rows)


def _first_line(stream: Any, start: int, end: int) -> int:
    """Return the first byte from `start` on at which a line begins; `end` if none does before."""
    if start == 0:
        return 0
    at = start - 1
    stream.seek(at)
    while raw := stream.read(min(SEARCH_BYTES, end - 1 - at)):
        if (found := raw.find(b"\n")) >= 0:
            return at + int(found) + 1
        at += len(raw)
    return end


def cuts(counts: Sequence[Count], start: int, first_line: int, shard_size: int) -> list[Cut]:
    """Return what is to be cut in each block of a file in which a shard begins.

    Args:
        counts: What was counted in its blocks, in order.
        start: Byte at which the first line behind the header begins.
        first_line: Number of that line.
        shard_size: Rows per shard.
    """
    found, rows, line = [], 0, first_line
    for block in counts:
        skip = -rows % shard_size
        num_shards = -(-(block.num_rows - skip) // shard_size)
        if num_shards > 0 and rows == 0:
            found.append(Cut(start, first_line, None, num_shards))
        elif num_shards > 0:
            found.append(Cut(block.start, line, skip, num_shards))
        rows += block.num_rows
        line += block.num_lines
    return found


def cut_shards(
    stream: Any,
    what: Cut,
    cells: Cells | None,
    path: str,
    shard_size: int,
    size: int = READ_BYTES,
) -> list[RowRange]:
    """Cut the shards that begin in a block.

    Args:
        stream: The file, which can be read from any byte.
        what: Which shards.
        cells: How lines become cells; None for JSONL.
        path: Path of the file, for errors.
        shard_size: Rows per shard.
        size: Number of bytes read at once.

    Raises:
        InputError: If the quotes of a line are not closed in it, or if the file has fewer rows than
            were counted.
    """
    start, line = what.start, what.first_line
    stream.seek(start)
    chunks: Iterator[Chunk] = line_chunks(stream, size, blank_characters(cells))
    if what.skip is not None:
        chunks, num_bytes, num_lines = _behind(chunks, what.skip)
        start, line = start + num_bytes, line + num_lines
    if cells and cells.quoting == "line":
        chunks = quotes_checked(chunks, cells, path, line)
    max_rows = what.num_shards * shard_size
    found = list(cut(chunks, start, line, shard_size, max_rows=max_rows, cells=cells))
    check_whole(path, len(found) == what.num_shards)
    return found


def _behind(chunks: Iterator[Chunk], num_rows: int) -> tuple[Iterator[Chunk], int, int]:
    """Return the chunks from the row behind `num_rows` rows on, and the bytes and lines before."""
    num_bytes = num_lines = 0
    for raw, starts, is_row in chunks:
        rows = np.flatnonzero(is_row)
        if len(rows) > num_rows:
            first = int(rows[num_rows])
            at = int(starts[first])
            rest = (raw[at:], starts[first:] - at, is_row[first:])
            return chain([rest], chunks), num_bytes + at, num_lines + first
        num_rows -= len(rows)
        num_bytes += len(raw)
        num_lines += len(is_row)
    return iter(()), num_bytes, num_lines


def joined(path: str, parts: Sequence[list[RowRange]], counts: Sequence[Count]) -> list[RowRange]:
    """Return the ranges of a file from those of its blocks.

    Raises:
        InputError: If they do not fit together, because the file was written to meanwhile.
    """
    ranges = [rows for part in parts for rows in part]
    fits = all(a.start + a.length == b.start for a, b in pairwise(ranges))
    num_rows = sum(rows.num_rows for rows in ranges)
    check_whole(path, fits and num_rows == sum(block.num_rows for block in counts))
    return ranges


def check_whole(path: str, is_whole: bool) -> None:
    """Refuse a file that is not as it was when its rows were counted."""
    if not is_whole:
        raise InputError(
            f"{path} changed while it was planned: run again when nothing writes to it any more"
        )
