"""Removes what nobody can need: old versions without a tag, and files of crashed attempts."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pyarrow as pa

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.table.claim import COMPLETE, TableClaim
from pipeline.table.side_files import PROBES, STEPS, SYNCS, is_data

SAFE_AGE = timedelta(days=7)
"""Age of a data file that no running command can be about to commit."""
LEAST_AGE = timedelta(hours=1)
"""Age below which a file is never removed: it may be a commit that is being made."""
PLACES = ("data/", f"{SYNCS}/", f"{STEPS}/", f"{PROBES}/")


@dataclass
class Garbage:
    """Counts of what was removed, or would be."""

    versions: int = 0
    files: int = 0
    bytes: int = 0


def collect_garbage(
    table: Location, *, older_than: timedelta = SAFE_AGE, dry_run: bool = False
) -> Garbage:
    """Remove versions that are old and have no tag, and old data files that no version names.

    A file that no version names may be one that a running command is about to commit. It is kept
    until it is LEAST_AGE old and, while the table is not complete, until it is SAFE_AGE old.

    Raises:
        InputError: If the age is negative.
    """
    if older_than < timedelta(0):
        raise InputError(f"an age of {older_than} is negative")
    claim = TableClaim(table)
    clean = claim.dataset.cleanup_old_versions
    if dry_run:
        clean = claim.dataset.explain_cleanup_old_versions
    stats = clean(older_than=older_than, error_if_tagged_old_versions=False)
    stats = stats.stats if dry_run else stats
    found = Garbage(stats.old_versions, stats.data_files_removed, stats.bytes_removed)
    session = table.file_session()
    safe = LEAST_AGE if claim.state == COMPLETE else SAFE_AGE
    for path, size in _unnamed_files(table, max(older_than, safe)):
        found.files += 1
        found.bytes += size
        if not dry_run:
            session.delete_file(path)
    return found


def _unnamed_files(table: Location, age: timedelta) -> list[tuple[str, int]]:
    """Return (path, bytes) of the files that are older than `age` and in no version.

    What a command staged or exchanged stays as long as one file of it is younger: results name
    files, and of a part of them the command that continues would make nothing. For the same reason
    the results and manifests come first.
    """
    before = datetime.now(UTC) - age
    # All files first: one that is committed meanwhile is then found among the tracked ones.
    files: pa.Table = table.dataset().all_files().read_all()
    tracked = set(table.dataset().tracked_files().read_all()["path"].to_pylist())
    unnamed = [
        file
        for file in files.to_pylist()
        if file["path"].startswith(PLACES) and file["path"] not in tracked
    ]
    in_use = {_unit(file["path"]) for file in unnamed if file["last_modified"] >= before}
    old = [(file["path"], file["size_bytes"]) for file in unnamed]
    old = [(path, size) for path, size in old if _unit(path) not in in_use]
    return sorted(old, key=lambda file: is_data(file[0]))


def _unit(path: str) -> str:
    """Return the folder that is removed as a whole or not at all, else the path itself."""
    if path.startswith((f"{SYNCS}/", f"{STEPS}/")):
        return "/".join(path.split("/")[:3])
    return path
