"""Runs of records that can be read alone: byte ranges of plain text, row ranges of columns.

A line belongs to the block in which its first byte lies, so that the blocks of a file hold each
line once, whichever of them are read.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec

from kalm_encoder.errors import InputError
from pipeline.corpus import text as text_files
from pipeline.corpus.inputs import RowRange, fsspec_options, range_hash
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import open_file
from pipeline.corpus.text import Record

AT_ONCE, CHUNK, WARM_UP = 1 << 10, 1 << 13, 1 << 18
Records = list[tuple[int, dict[str, Any] | str]]


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or a row group of one, and how it is cut.

    Attributes:
        file: number of the file.
        path: of the file.
        fields: of a passage in it.
        start: first row; 0 in a text file.
        length: bytes on disk, or rows.
        block: bytes or rows a block.
        columns: of a CSV or TSV file; empty elsewhere.
        content: hash of a columnar file.
        version: of a Lance table; 0 elsewhere.
    """

    file: int
    path: str
    fields: Fields
    start: int
    length: int
    block: int
    columns: tuple[str, ...] = ()
    content: str = ""
    version: int = 0

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return -(-self.length // self.block)


def text_size(path: str, storage_options: dict[str, str] | None) -> int:
    """Return the bytes of a file as it lies on its store.

    Raises:
        InputError: it is not there.
    """
    try:
        fs, inner = fsspec.core.url_to_fs(path, **fsspec_options(path, storage_options))
        return int(fs.size(inner))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_piece(
    piece: Piece, number: int, storage_options: dict[str, str] | None
) -> tuple[int, int, Records]:
    """Read one block: its size (bytes of its records, or rows), its lines and its records.

    Raises:
        InputError: the file cannot be read.
    """
    if not piece.content:
        raw = _lines_of(piece, number, storage_options)
        records = list(text_files.parse_all(io.BytesIO(raw), piece.columns, piece.path))
        return len(raw), raw.count(b"\n") + (raw[-1:] not in (b"", b"\n")), records
    start = piece.start + number * piece.block
    rows = min(piece.block, piece.start + piece.length - start)
    part = RowRange(
        start, rows, start + 1, rows, range_hash(piece.content, start, rows), (), piece.version
    )
    file = open_file(piece.path, storage_options)
    return rows, rows, list(file.read(part, piece.fields))


def _lines_of(piece: Piece, number: int, storage_options: dict[str, str] | None) -> bytes:
    """Return the lines that begin in a block, the last one whole."""
    begin = number * piece.block
    end = min(begin + piece.block, piece.length)
    try:
        fs, path = fsspec.core.url_to_fs(piece.path, **fsspec_options(piece.path, storage_options))
        # The byte before says whether a line begins with the block.
        raw = fs.cat_file(path, start=max(0, begin - 1), end=end)
        if begin:
            found = raw.find(b"\n")
            raw = raw[found + 1 :] if found >= 0 else b""
        while raw and not raw.endswith(b"\n") and end < piece.length:
            more = fs.cat_file(path, start=end, end=min(end + piece.block, piece.length))
            found = more.find(b"\n")
            raw += more[: found + 1] if found >= 0 else more
            end += piece.block
    except OSError as error:
        raise InputError(f"cannot read {piece.path}: {error}") from error
    return bytes(raw)


class OrderedFile:
    """A text file read from its start, for what cannot be entered in the middle.

    Attributes:
        warm_from: number of the first block after WARM_UP. Before it a compressor knows little and
            packs worse, and a decompressor takes bytes that it only needs later.
        finished: whether the end was reached.
    """

    def __init__(self, piece: Piece, storage_options: dict[str, str] | None) -> None:
        self._piece, self._options = piece, storage_options
        self._taken = self._delivered = 0
        self.warm_from = 0
        self.finished = False

    def blocks(self) -> Iterator[tuple[int, int, int, int, Records]]:
        """Yield (number, bytes on the store, decompressed bytes, lines, records) of each block.

        Raises:
            InputError: the file cannot be read or decompressed.
        """
        path, columns = self._piece.path, self._piece.columns
        try:
            with fsspec.open(path, "rb", **fsspec_options(path, self._options)) as raw:
                lines = self._lines(raw)
                for _ in range(self._piece.start):
                    next(lines)
                number = size = 0
                waiting: list[Record] = []
                for record in text_files.records(lines, columns, path):
                    waiting.append(record)
                    size += len(record.raw)
                    if size >= self._piece.block:
                        yield self._block(number, waiting)
                        number, size, waiting = number + 1, 0, []
                if waiting:
                    yield self._block(number, waiting)
                self.finished = True
        except (OSError, EOFError) as error:
            raise InputError(f"cannot read {path}: {error}") from error

    def _block(self, number: int, waiting: list[Record]) -> tuple[int, int, int, int, Records]:
        whole = b"".join(record.raw for record in waiting)
        records = text_files.parse_all(io.BytesIO(whole), self._piece.columns, self._piece.path)
        if self._delivered < WARM_UP:
            self.warm_from = number + 1
        taken, self._taken = self._taken, 0
        lines = sum(record.num_lines for record in waiting)
        return number, taken, len(whole), lines, list(records)

    def _lines(self, raw: Any) -> Iterator[bytes]:
        """Yield lines, taking small pieces from the store so that what was taken is known."""
        compression = fsspec.utils.infer_compression(self._piece.path)
        counted = _Counted(raw, self)
        opener = fsspec.compression.compr[compression] if compression else None
        stream = opener(counted, mode="rb") if opener else counted
        rest = b""
        while chunk := stream.read(CHUNK):
            self._delivered += len(chunk)
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield line + b"\n"
        if rest:
            yield rest

    def take(self, num_bytes: int) -> None:
        """Count bytes taken from the store."""
        self._taken += num_bytes


class _Counted(io.RawIOBase):
    """A stream that hands out little at a time and tells its reader how much it took."""

    def __init__(self, raw: Any, reader: OrderedFile) -> None:
        self._raw, self._reader = raw, reader

    def readable(self) -> bool:
        """Return True, as io.RawIOBase asks for."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a part of the buffer."""
        data = self._raw.read(min(len(buffer), AT_ONCE))
        buffer[: len(data)] = data
        self._reader.take(len(data))
        return len(data)


def count_lines(pieces: Sequence[Piece], deadline: float) -> int | None:
    """Count the lines of local files; None when time runs out, or where files are remote."""
    if any("://" in piece.path for piece in pieces):
        return None
    lines = 0
    for piece in pieces:
        with open(piece.path, "rb") as stream:
            last = b"\n"
            while chunk := stream.read(1 << 22):
                lines += chunk.count(b"\n")
                last = chunk[-1:]
                if time.monotonic() > deadline:
                    return None
            lines += last != b"\n"
    return lines
