"""Planning of a text file: where its shards begin and what their bytes hash to, in one read of it.

Where each line is a record, a few megabytes are cut at a time: no Python object a line, and
reading, decompressing, searching and hashing all run without the interpreter lock, so that several
files are scanned at once by threads. Quoted CSV is read record by record.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import FieldOptions, Fields
from pipeline.corpus.text import Record, Slice, detect, is_plain, open_text, records

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 4 << 20
NEWLINE = 10
IS_BLANK = np.isin(np.arange(256), np.frombuffer(b" \t\n\r\v\f", np.uint8))
"""By byte: whether `bytes.strip` takes it away."""


def scan(
    path: str,
    shard_size: int,
    max_rows: int | None,
    options: FieldOptions,
    storage_options: dict[str, str] | None,
) -> tuple[Fields, list[Slice]]:
    """Choose the fields of a file and cut it into slices, reading it once.

    Raises:
        InputError: the file cannot be read or decompressed, or has no id or text field.
    """
    fields, columns, header = detect(path, options, storage_options)
    try:
        with open_text(path, storage_options) as stream:
            cutter = _Cutter(
                start=len(header.raw) if header else 0,
                first_line=1 + (header.num_lines if header else 0),
                shard_size=shard_size,
                max_rows=max_rows,
                columns=columns,
            )
            stream.read(cutter.start)
            if is_plain(columns):
                return fields, list(cutter.cut_lines(whole_lines(stream)))
            return fields, list(cutter.cut_records(records(iter(stream), columns, path)))
    except (OSError, EOFError) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def whole_lines(stream: Any, size: int = BLOCK) -> Iterator[bytes]:
    """Yield the bytes of a stream in blocks of about `size` that end where a line ends."""
    parts: list[bytes] = []
    while block := stream.read(size):
        end = block.rfind(b"\n") + 1
        if end:
            yield b"".join([*parts, block[:end]])
            parts.clear()
        parts.append(block[end:])
    if any(parts):
        yield b"".join(parts)


class _Cutter:
    """Groups records into slices of `shard_size`, at most `max_rows` in all.

    A slice ends where the record begins that has no place in it; blank lines are no records, and
    stay in the slice of the record before them.
    """

    def __init__(
        self,
        *,
        start: int,
        first_line: int,
        shard_size: int,
        max_rows: int | None,
        columns: tuple[str, ...],
    ) -> None:
        self.start, self._line, self._columns = start, first_line, columns
        self._shard_size, self._left = shard_size, max_rows
        self._begin()

    def cut_lines(self, blocks: Iterator[bytes]) -> Iterator[Slice]:
        """Yield the slices of blocks of whole lines, each line a record."""
        for block in blocks:
            starts = _line_starts(block)
            counting = np.flatnonzero(~_blank(block, starts))
            line = row = 0  # of this block, taken so far
            while len(counting) - row > (room := self._room()):
                full = int(counting[row + room])
                self._add(block, starts, line, full, room)
                yield self._end()
                if self._left == 0:
                    return
                line, row = full, row + room
            self._add(block, starts, line, len(starts) - 1, len(counting) - row)
        if self._rows:
            yield self._end()

    def cut_records(self, found: Iterator[Record]) -> Iterator[Slice]:
        """Yield the slices of records."""
        for record in found:
            counts = bool(record.raw.strip())
            if counts and self._room() == 0:
                yield self._end()
                if self._left == 0:
                    return
            self._take(record.raw, record.num_lines, counts)
        if self._rows:
            yield self._end()

    def _begin(self) -> None:
        self._length = self._lines = self._rows = 0
        self._digest = xxhash.xxh3_128()

    def _room(self) -> int:
        """Return how many more records the slice may take."""
        room = self._shard_size - self._rows
        return room if self._left is None else min(room, self._left)

    def _add(
        self, block: bytes, starts: NDArray[np.int64], first: int, last: int, rows: int
    ) -> None:
        """Take lines `first` to `last`, exclusive, of a block."""
        piece = memoryview(block)[starts[first] : starts[last]]
        self._take(piece, last - first, rows)

    def _take(self, raw: bytes | memoryview, lines: int, rows: int) -> None:
        self._digest.update(raw)
        self._length += len(raw)
        self._lines += lines
        self._rows += rows
        self._left = None if self._left is None else self._left - rows

    def _end(self) -> Slice:
        done = Slice(
            self.start,
            self._length,
            self._line,
            self._rows,
            self._digest.hexdigest(),
            self._columns,
        )
        self.start, self._line = self.start + self._length, self._line + self._lines
        self._begin()
        return done


def _line_starts(block: bytes) -> NDArray[np.int64]:
    """Return where the lines of a block begin, and its length: n + 1 numbers for n lines."""
    starts = np.flatnonzero(np.frombuffer(block, np.uint8) == NEWLINE) + 1
    whole = block.endswith(b"\n")
    return np.concatenate([[0], starts, [] if whole else [len(block)]]).astype(np.int64)


def _blank(block: bytes, starts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each line whether it is white space alone; most are known by their first byte."""
    blank: NDArray[np.bool_] = IS_BLANK[np.frombuffer(block, np.uint8)[starts[:-1]]]
    for line in np.flatnonzero(blank):
        blank[line] = not block[starts[line] : starts[line + 1]].strip()
    return blank
