"""A row of a file becomes a Passage, or a Reject that says why it cannot be encoded.

Knows no file format: rows arrive as mappings. A bad row never raises.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kalm_encoder.errors import InputError

ID_FIELDS = ("_id", "id", "doc_id", "docid", "pid")
TEXT_FIELDS = ("text", "contents", "content", "body", "passage")
TITLE_FIELDS = ("title",)
MAX_TEXT_CHARS = 10_000_000
"""A longer text is rejected: it is no passage, and all but its start would be cut off anyway."""

RawRow = dict[str, Any] | str
"""The fields of a row, or the reason why it cannot be parsed."""


@dataclass(frozen=True, slots=True)
class Passage:
    """One row of a corpus, as it is encoded and stored.

    Attributes:
        id: Id of the passage.
        text: Title and text, joined.
        line: Line of its file, from 1; it plays no part in comparisons.
    """

    id: str
    text: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reject:
    """An input row that cannot be encoded, and the reason."""

    path: str
    line: int
    reason: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the columns or keys that make a passage."""

    id: str
    text: str
    title: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the fields to read."""
        return [self.id, self.text, *([self.title] if self.title else [])]


@dataclass(frozen=True, slots=True)
class FieldOptions:
    """How the user said that files are to be read; None means that it is found out.

    Attributes:
        id: Field that holds the id.
        text: Field that holds the text.
        title: Field that holds the title.
        format: Format of the files whose names tell none.
    """

    id: str | None = None
    text: str | None = None
    title: str | None = None
    format: str | None = None

    def detect(self, names: Iterable[str], path: str) -> Fields:
        """Choose the fields of one file among the names that it has.

        Raises:
            InputError: If there is no id or text field, or if a named field is missing.
        """
        present = list(names)
        chosen = {}
        for role, named, guesses in (
            ("id", self.id, ID_FIELDS),
            ("text", self.text, TEXT_FIELDS),
            ("title", self.title, TITLE_FIELDS),
        ):
            found = [n for n in ([named] if named else guesses) if n in present]
            if not found and (named or role != "title"):
                wanted = named or ", ".join(guesses)
                raise InputError(
                    f"{path} has no {role} field {wanted}; it has {', '.join(present) or 'none'}. "
                    f"Name it with --{role}-field"
                )
            chosen[role] = found[0] if found else None
        return Fields(str(chosen["id"]), str(chosen["text"]), chosen["title"])


def to_rows(
    rows: Iterable[tuple[int, RawRow]], fields: Fields, path: str
) -> tuple[list[Passage], list[Reject]]:
    """Sort the (line, row) pairs of a file into passages and rejects, each in input order."""
    found = [to_passage(row, fields, path, line) for line, row in rows]
    passages = [row for row in found if isinstance(row, Passage)]
    return passages, [row for row in found if isinstance(row, Reject)]


def to_passage(row: RawRow, fields: Fields, path: str, line: int) -> Passage | Reject:
    """Make a passage from one row, or say why it is not one.

    Title and text are joined as BEIR does it: `(title + " " + text).strip()`. An integer id becomes
    its decimal string. An empty text is legal.
    """
    if isinstance(row, str):
        return Reject(path, line, row)
    id_, text = row.get(fields.id), row.get(fields.text)
    title = row.get(fields.title) if fields.title else None
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)

    def reject(reason: str) -> Reject:
        return Reject(path, line, reason, id_ if isinstance(id_, str) and _is_utf8(id_) else None)

    if not isinstance(id_, str) or not id_:
        return reject(f"field {fields.id!r} holds no id: {_shown(id_)}")
    if not isinstance(text, str):
        return reject(f"field {fields.text!r} holds no text: {_shown(text)}")
    if title is not None and not isinstance(title, str):
        return reject(f"field {fields.title!r} holds no text: {_shown(title)}")
    joined = (text if title is None else f"{title} {text}").strip()
    if len(joined) > MAX_TEXT_CHARS:
        return reject(f"text of {len(joined):,} characters, at most {MAX_TEXT_CHARS:,}: split it")
    if not _is_utf8(id_ + joined):
        return reject("not valid Unicode (undecodable bytes or a lone surrogate)")
    return Passage(id_, joined, line)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return "missing or null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
