"""The folder of a disk cache, which several processes share: what is in it, and making room.

Whoever adds or removes segments holds the lock of the folder. Segments are read without it, so a
file may be gone at any moment.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kalm_encoder.errors import InputError, first_line
from kalm_encoder.table.cache.segments import SUFFIX, SegmentWriter

LOCK = "kalm.lock"
MAX_FILES = 10_000
"""Number of segments above which the oldest are removed, whatever their size: each process that
ends leaves one that may be small."""


@dataclass(frozen=True)
class SegmentFile:
    """A segment in the folder.

    Attributes:
        path: The file.
        size: Number of bytes, those included that are reserved and not written yet.
        used: When it was last used, in nanoseconds since 1970.
    """

    path: Path
    size: int
    used: int


class CacheFolder:
    """A folder with segments of one or more tables.

    Args:
        path: The folder; it is made if it is not there.

    Raises:
        InputError: If it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._locked():
                probe = path / f"probe-{secrets.token_hex(4)}"
                probe.write_bytes(b"kalm")
                probe.unlink()
        except OSError as error:
            raise InputError(
                f"the disk cache {path} cannot be written ({first_line(error)}): name a folder on "
                "a local disk that has room and that this user may write, or leave the cache out"
            ) from error

    @classmethod
    def existing(cls, path: Path) -> CacheFolder:
        """Return the folder of a cache that is there.

        Raises:
            InputError: If there is none, or it cannot be written.
        """
        if not (path / LOCK).exists():
            raise InputError(
                f"{path} is not the folder of a disk cache: name the one you serve with"
            )
        return cls(path)

    def check_room(self, size: int) -> None:
        """Refuse a disk that has no room for a segment of this size.

        Raises:
            InputError: The message says how much room there is.
        """
        stat = os.statvfs(self.path)
        free = stat.f_bavail * stat.f_frsize + sum(s.size for s in self.segments())
        if free < size:
            raise InputError(
                f"the disk of {self.path} has {free / 2**20:.1f} MB free, and a disk cache needs "
                f"{size / 2**20:.1f} MB at least: free some, or name a folder on another disk"
            )

    def segments(self, table: str = "") -> list[SegmentFile]:
        """Return the segments whose names begin with `table`: those of a table, or all."""
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name.startswith(table) and entry.name.endswith(SUFFIX):
                    with suppress(FileNotFoundError):
                        stat = entry.stat()
                        path = self.path / entry.name
                        found.append(SegmentFile(path, stat.st_size, stat.st_mtime_ns))
        return found

    def begin(self, table: str, state: str, size: int, max_bytes: int) -> SegmentWriter | None:
        """Begin a segment, and remove the oldest ones so that all fit into `max_bytes`.

        Args:
            table: Name that stands for the table.
            state: Erasures that the caller's version of the table has seen.
            size: Most bytes that the segment will have.
            max_bytes: Most bytes that all files of the folder may have.

        Returns:
            The segment, or None if another process has seen other erasures.

        Raises:
            OSError: If there is no room on the disk, or the folder cannot be written.
        """
        with self._locked():
            if self._state(table) != state:
                return None
            files = sorted(self.segments(), key=lambda file: file.used)
            rest = size + sum(file.stat().st_size for file in self.path.iterdir())
            while files and (rest > max_bytes or len(files) >= MAX_FILES):
                gone = files.pop(0)
                gone.path.unlink(missing_ok=True)
                rest -= gone.size
            if rest > max_bytes:
                raise OSError(errno.ENOSPC, "other files in the folder leave no room")
            name = f"{table}-{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
            return SegmentWriter(self.path / name, size)

    def adopt(self, table: str, state: str) -> None:
        """Remove the segments of a table, unless they were written after the same erasures.

        From now on only those who have seen the same erasures write to this table's segments.

        Raises:
            OSError: If the folder cannot be written.
        """
        with self._locked():
            if self._state(table) == state:
                return
            for file in self.segments(table):
                file.path.unlink(missing_ok=True)
            draft = self.path / f"{table}.draft"
            draft.write_text(state)
            draft.replace(self.path / f"{table}.erasures")

    def purge(self) -> int:
        """Remove all segments, whatever table they are of; return their number.

        Raises:
            OSError: If the folder cannot be written.
        """
        with self._locked():
            files = self.segments()
            for file in files:
                file.path.unlink(missing_ok=True)
            return len(files)

    def _state(self, table: str) -> str | None:
        try:
            return (self.path / f"{table}.erasures").read_text()
        except FileNotFoundError:
            return None

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)  # which gives the lock back
