"""What a table says of its erasures, as far as a cache must know it.

`kalm erase` records an erasure beside the table before it deletes anything, and completes the
record when all is gone. The records are only added to.
"""

from __future__ import annotations

import hashlib
import json

from kalm_encoder.errors import KalmError, first_line
from kalm_encoder.table.location import Location, read_text

ERASED = "_kalm/erased"
"""Folder of the erasures of a table, one file each, below the table's."""


def erasure_state(table: Location, version: int) -> str | None:
    """Return a text that stands for the erasures that a version of a table has seen.

    As long as an erasure is under way, every version has a text of its own, since it cannot be told
    whether the rows are in it. The text of an erased row's version thus is never that of a later
    one.

    Returns:
        The text, or None if the version is not there any more: an erasure overtook its reader.

    Raises:
        KalmError: If the store refuses.
    """
    try:
        session, seen = table.file_session(), []
        for path in sorted(session.list(ERASED)):
            finished = json.loads(read_text(session, path))["finished"]
            seen.append((path, finished or f"under way at version {version}"))
    except (OSError, RuntimeError, ValueError) as error:
        raise KalmError(
            f"the erasures of {table} cannot be read, which a disk cache must know: "
            f"{first_line(error)}"
        ) from error
    # An erasure removes older versions before it is finished. A version that is there now has
    # therefore not been overtaken by one that was finished when the files were read.
    try:
        table.dataset().checkout_version(version)
    except (OSError, ValueError):
        return None
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:32]
