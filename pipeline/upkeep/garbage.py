"""Removes what nobody can need: old versions without a tag, and files of crashed attempts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.table.claim import COMPLETE, TableClaim
from pipeline.table.side_files import SYNCS

SAFE_AGE = timedelta(days=7)
LEAST_AGE = timedelta(hours=1)
"""A file younger than this may be a commit that is being made."""
PLACES = ("data/", f"{SYNCS}/")


@dataclass
class Garbage:
    """What was removed, or would be."""

    versions: int = 0
    files: int = 0
    bytes: int = 0


def collect_garbage(
    location: Location,
    *,
    older_than: timedelta = SAFE_AGE,
    dry_run: bool = False,
) -> Garbage:
    """Remove versions that are old and have no tag, and old files that no version names.

    A file that no version names may be one that a running command is about to commit. It is kept
    until it is LEAST_AGE old and, while the table is not complete, until it is SAFE_AGE old.

    Raises:
        InputError: a negative age.
    """
    if older_than < timedelta(0):
        raise InputError(f"an age of {older_than} is negative")
    writer = TableClaim(location)
    safe = LEAST_AGE if writer.state == COMPLETE else SAFE_AGE
    options = {"older_than": older_than, "error_if_tagged_old_versions": False}
    if dry_run:
        stats = writer.dataset.explain_cleanup_old_versions(**options).stats
    else:
        stats = writer.dataset.cleanup_old_versions(**options)
    found = Garbage(stats.old_versions, stats.data_files_removed, stats.bytes_removed)
    session = location.file_session()
    for path, size in _orphans(location, max(older_than, safe)):
        found.files += 1
        found.bytes += size
        if not dry_run:
            session.delete_file(path)
    return found


def _orphans(location: Location, age: timedelta) -> list[tuple[str, int]]:
    """Return (path, bytes) of data files that are older than `age` and in no version."""
    before = datetime.now(UTC) - age
    # All files first: one that is committed meanwhile is then found among the tracked ones.
    every: pa.Table = location.dataset().all_files().read_all()
    tracked = location.dataset().tracked_files().read_all()["path"].to_pylist()
    known = set(tracked)
    return [
        (row["path"], row["size_bytes"])
        for row in every.to_pylist()
        if row["path"].startswith(PLACES)
        and row["path"] not in known
        and row["last_modified"] < before
    ]
