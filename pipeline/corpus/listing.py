"""Which files match a pattern or lie in a folder, in any store.

fsspec's own glob leaves out, in silence, folders that cannot be read and links to folders. Here
both count. Files and folders whose names begin with `_` or `.` are left out, as Spark and Hive do
it, unless the pattern asks for them. A Lance table is one thing and not looked into.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

TABLE_SUFFIX = ".lance"
Entry = dict[str, Any]
"""What fsspec knows of a file or folder: its `name` with the whole path, its `type`, and more."""


def look_up(fs: Any, path: str) -> Entry | None:
    """Return what is at a path, or None if nothing is there.

    Raises:
        FileNotFoundError: If a server could not be asked; its cause says why.
    """
    try:
        found: Entry = fs.info(path)
    except FileNotFoundError as error:
        why = error.__cause__
        unasked = why and not isinstance(why, FileNotFoundError)
        if unasked and getattr(why, "status", None) != 404 and not has_pattern(path):
            raise
        return None
    return found


def has_pattern(path: str) -> bool:
    """Return whether a path has characters that stand for others."""
    return any(c in path for c in "*?[")


def matches(fs: Any, pattern: str) -> list[Entry]:
    """Return the files and tables that match a pattern, with those below a folder that matches.

    Raises:
        OSError: If a folder cannot be read, or a link points nowhere.
    """
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if has_pattern(part)), len(parts))
    root = "/".join(parts[:first])
    if root and look_up(fs, root) is None:
        return []
    found = {entry["name"]: entry for entry in _walk(fs, root or fs.root_marker, parts[first:])}
    return [found[name] for name in sorted(found)]


def _walk(fs: Any, folder: str, parts: list[str]) -> Iterator[Entry]:
    """Yield what matches the parts of a pattern below a folder, and what lies below that."""
    part, rest = (parts[0], parts[1:]) if parts else ("**", [])
    if part == "**" and rest:
        yield from _walk(fs, folder, rest)
    for name, entry in _matching(_entries(fs, folder), part):
        if entry["type"] == "directory" and not name.endswith(TABLE_SUFFIX):
            yield from _walk(fs, entry["name"], parts if part == "**" else rest)
        elif not rest:
            yield entry


def _matching(entries: dict[str, Entry], part: str) -> list[tuple[str, Entry]]:
    """Return the entries of a folder that match one part of a pattern, or have it as their name."""
    if part in entries:  # a name may hold brackets
        return [(part, entries[part])]
    return [
        (name, entry)
        for name, entry in entries.items()
        if (name[0] not in "_." or name[0] == part[0]) and fnmatchcase(name, part)
    ]


def _entries(fs: Any, folder: str) -> dict[str, Entry]:
    """Return what lies in a folder, by name; a link counts as what it points to."""
    found = {}
    for entry in fs.ls(folder, detail=True):
        path = entry["name"].rstrip("/")
        if path != folder.rstrip("/"):  # object stores have empty objects that stand for folders
            known = fs.info(path) if entry.get("islink") else entry
            found[base_name(path)] = {**known, "name": path}
    return found


def base_name(path: str) -> str:
    """Return the last part of a path."""
    return path.rstrip("/").rsplit("/", 1)[-1]
