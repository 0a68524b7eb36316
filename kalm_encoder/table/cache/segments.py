"""Segment files: the states of many rows of one table, one record behind the other.

    record   mark, size of the states, key, xxh3_64 of the states with the key as seed; the states
    footer   once nothing is added any more: key and offset of every record, and their checksum

A segment has one writer, which takes its whole size on the disk before it writes, and gives back
what is left when it ends. Where a process was killed, what follows the last whole record is
ignored. All numbers are little endian; the `1` of the suffix is the version of this format.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

SUFFIX = ".kalm1"
MARK = b"KSR1"
RECORD = struct.Struct("<4sIQQ")
FOOTER_MARK = b"KSF1"
FOOTER = struct.Struct("<4sIQ")
ENTRY = np.dtype([("key", "<u8"), ("offset", "<u4")])
"""An entry of a segment: a key, and the byte at which its record begins."""


def read_entries(path: Path, start: int) -> tuple[NDArray[Any], int | None]:
    """Return the entries of the records from an offset on, and where the next record will be.

    The states themselves are not read: `read_states` compares their checksum.

    Args:
        path: The segment.
        start: Offset of a record, at which the last call ended. 0 begins with the first.

    Returns:
        An array of ENTRY, and None in place of the offset if the segment is finished.

    Raises:
        OSError: If the file is gone or cannot be read.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        if (entries := _footer(fd, size)) is not None:
            return entries[entries["offset"] >= start], None
        found, offset = [], start
        while offset + RECORD.size <= size:
            mark, length, key, _ = RECORD.unpack(os.pread(fd, RECORD.size, offset))
            if mark != MARK or offset + RECORD.size + length > size:
                break
            found.append((key, offset))
            offset += RECORD.size + length
        return np.array(found, ENTRY), offset
    finally:
        os.close(fd)


def _footer(fd: int, size: int) -> NDArray[Any] | None:
    if size < FOOTER.size:
        return None
    mark, count, digest = FOOTER.unpack(os.pread(fd, FOOTER.size, size - FOOTER.size))
    begin = size - FOOTER.size - count * ENTRY.itemsize
    if mark != FOOTER_MARK or begin < 0:
        return None
    raw = os.pread(fd, count * ENTRY.itemsize, begin)
    return np.frombuffer(raw, ENTRY) if xxhash.xxh3_64_intdigest(raw) == digest else None


def read_states(fd: int, offset: int, key: int, size: int) -> memoryview | None:
    """Return the states of a record, or None if it is not what was written under this key."""
    raw = memoryview(os.pread(fd, RECORD.size + size, offset))
    if len(raw) < RECORD.size + size:
        return None
    mark, length, found, digest = RECORD.unpack_from(raw)
    states = raw[RECORD.size :]
    if (mark, length, found) != (MARK, size, key):
        return None
    return states if xxhash.xxh3_64_intdigest(states, seed=key) == digest else None


class SegmentWriter:
    """Writes one new segment.

    No file stays open between two calls: an open one that another process removes would keep its
    place on the disk.

    Args:
        path: The file, which must not be there yet.
        size: Most bytes that it may have; they are taken at once.

    Attributes:
        path: The file.
        end: Offset behind the last record.

    Raises:
        OSError: If there is no room on the disk, or the folder cannot be written.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        self.end = 0
        self._entries: list[tuple[int, int]] = []
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError:
            path.unlink()
            raise
        finally:
            os.close(fd)

    def count_fitting(self, sizes: Sequence[int]) -> int:
        """Return how many of the next records, with so many bytes of states each, have room."""
        end = self.end + FOOTER.size + len(self._entries) * ENTRY.itemsize
        for count, size in enumerate(sizes):
            end += RECORD.size + size + ENTRY.itemsize
            if end > self._size:
                return count
        return len(sizes)

    def append(self, records: Sequence[tuple[int, memoryview]]) -> NDArray[Any]:
        """Write records that fit, each a key and its states; return their entries.

        Raises:
            OSError: If the file is gone or cannot be written.
        """
        parts: list[bytes | memoryview] = []
        entries, end = [], self.end
        for key, states in records:
            digest = xxhash.xxh3_64_intdigest(states, seed=key)
            parts += [RECORD.pack(MARK, states.nbytes, key, digest), states]
            entries.append((key, end))
            end += RECORD.size + states.nbytes
        self._write(self.end, b"".join(parts))
        self.end = end
        self._entries += entries
        return np.array(entries, ENTRY)

    def finish(self) -> None:
        """Write the footer behind the last record, and give back the room behind it.

        Raises:
            OSError: If the file is gone or cannot be written.
        """
        raw = np.array(self._entries, ENTRY).tobytes()
        footer = FOOTER.pack(FOOTER_MARK, len(self._entries), xxhash.xxh3_64_intdigest(raw))
        self._write(self.end, raw + footer)
        os.truncate(self.path, self.end + len(raw) + len(footer))

    def _write(self, offset: int, content: bytes) -> None:
        fd = os.open(self.path, os.O_WRONLY)
        try:
            view = memoryview(content)
            while view:
                written = os.pwrite(fd, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(fd)
