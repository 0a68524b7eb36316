"""Small text files beside a table, on whatever store the table is."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lance.file import LanceFileSession

STORE_ERRORS = OSError, RuntimeError, ValueError
"""What a LanceFileSession raises where the store fails."""


def write_text(session: LanceFileSession, path: str, text: str) -> None:
    """Write a file, in place of what is there; `path` is below the session's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text")
        file.write_text(text, encoding="utf-8")
        session.upload_file(str(file), path)


def read_text(session: LanceFileSession, path: str) -> str:
    """Return the text of a file; `path` is below the session's."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text")
        session.download_file(path, str(file))
        return file.read_text(encoding="utf-8")
