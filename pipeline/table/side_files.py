"""The small files of this project inside a table's folder: where they lie, and reading them.

Lance ignores whatever it has not written itself, so they share the table's folder and store.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from lance.file import LanceFileSession

from kalm_encoder.table.location import read_text as read_text

KALM = "_kalm"
"""Folder of all of them."""
REJECTS = "_kalm/rejects"
"""Folder of the rejected rows, one file per shard."""
RUNS = "_kalm/runs"
"""Folder of the records of all runs."""
RUN_VIEW = "_kalm/live.json"
"""File in which a running job says what it does now."""
KEPT_PLANS = "_kalm/plan"
"""Folder of the plans kept for a resume."""
SYNCS = "_kalm/sync"
"""Folder in which a sync encodes what changed, before it is merged into the table."""
STEPS = "_kalm/steps"
"""Folder of what the workers of a step exchange; it is removed when the step is done."""
FINISH = "_kalm/steps/finish"
"""Folder of the steps that finish a table."""
PROBES = "_kalm/probes"
"""Folder in which the store is tried."""
STORE_ERRORS = OSError, RuntimeError, ValueError
"""What a LanceFileSession raises where the store fails."""


def is_data(path: str) -> bool:
    """Return whether a file is neither a manifest nor a result, which say that others are there.

    Where many files are removed these go first.
    """
    return "/_versions/" not in path and not path.endswith(".json")


def write_text(session: LanceFileSession, path: str, text: str) -> None:
    """Write a file, in place of what is there; `path` is below the session's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text")
        file.write_text(text, encoding="utf-8")
        session.upload_file(str(file), path)
