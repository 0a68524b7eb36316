"""A cache of states on the local disk, shared by tables and by processes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from kalm_encoder.errors import InputError
from kalm_encoder.table.cache.cached_table import CachedTable
from kalm_encoder.table.cache.folder import CacheFolder

SEGMENT_BYTES = 64 << 20
"""Most bytes of a segment: what is removed at once, and what a process that writes reserves."""
MIN_SEGMENTS = 8
"""Number of segments for which there is room at least; they are smaller in a small cache."""
MIN_BYTES = 1 << 20
"""Fewest bytes that a cache may be limited to."""


class DiskCache:
    """A folder on the local disk in which states are kept that were read from an object store.

    It may be shared: by tables, and by processes that give the same folder and size. A copy that is
    unpickled on another machine uses the folder there.

    Args:
        folder: The folder. It is made if it is not there.
        max_bytes: Most bytes that its files may have together.

    Raises:
        InputError: If `max_bytes` is below 1 MiB, the folder cannot be written, or its disk is
            full.
    """

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        if max_bytes < MIN_BYTES:
            raise InputError(f"a disk cache of {max_bytes} bytes is too small: give 1 MiB or more")
        self.folder = CacheFolder(Path(folder).absolute())
        self.max_bytes = max_bytes
        self.segment_bytes = min(SEGMENT_BYTES, max_bytes // MIN_SEGMENTS)
        self.folder.check_room(self.segment_bytes)
        self._tables: dict[str, CachedTable] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[DiskCache], tuple[str, int]]:
        return DiskCache, (str(self.folder.path), self.max_bytes)

    def table(self, uri: str) -> CachedTable:
        """Return what is kept of the table at an address, for all of its versions."""
        with self._lock:
            if uri not in self._tables:
                self._tables[uri] = CachedTable(
                    self.folder, uri, segment_bytes=self.segment_bytes, max_bytes=self.max_bytes
                )
            return self._tables[uri]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all segments in the folder, with what writers have reserved."""
        try:
            return sum(file.size for file in self.folder.segments())
        except OSError:  # somebody removed the folder
            return 0

    @property
    def lookups(self) -> tuple[int, int]:
        """Numbers of rows that this process found here, and of those that it did not find."""
        tables = list(self._tables.values())
        return sum(t.hits for t in tables), sum(t.misses for t in tables)
