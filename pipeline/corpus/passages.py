"""A row of a file becomes a Passage, or a Reject that says why it cannot be encoded.

Knows no file format: rows arrive as mappings. A bad row never raises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from kalm_encoder.errors import InputError
from kalm_encoder.table.metadata import Columns

ID_FIELDS = ("_id", "id", "doc_id", "docid", "docno", "pid")
TEXT_FIELDS = ("text", "contents", "content", "body", "passage")
TITLE_FIELDS = ("title",)
KNOWN_FIELDS = {*ID_FIELDS, *TEXT_FIELDS, *TITLE_FIELDS}
SHOWN_NAMES, SHOWN_CHARS = 20, 40
"""Names that a message lists, and characters that it shows of each."""
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
        line: Line of its file, from 1; it plays no part in comparisons, nor do title and body.
        title: Title, as the file has it; "" if there is none.
        body: Text without the title, as the file has it.
    """

    id: str
    text: str
    line: int = field(default=0, compare=False)
    title: str = field(default="", compare=False)
    body: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Reject:
    """An input row that cannot be encoded, and the reason."""

    path: str
    line: int
    reason: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the columns or keys that make a passage.

    Attributes:
        id: Field of the id.
        text: Field of the text.
        title: Field of the title. None takes `title` from each row that has one.
        keep: Fields that become metadata columns, and their types.
    """

    id: str
    text: str
    title: str | None = None
    keep: Columns = ()

    @property
    def names(self) -> list[str]:
        """Names of the fields that make a passage."""
        return [self.id, self.text, *([self.title] if self.title else [])]

    @property
    def kept_names(self) -> list[str]:
        """Names of the fields that become metadata columns."""
        return [name for name, _ in self.keep]


@dataclass(frozen=True, slots=True)
class FieldOptions:
    """What the user said of how files are read; None leaves it to be detected, file by file.

    Attributes:
        id: Field of the id.
        text: Field of the text.
        title: Field of the title.
        format: Format of the files whose names tell none.
        columns: Names of the columns of CSV and TSV files that have no header.
        quoting: Whether cells may be quoted, as RFC 4180 says.
        keep: Fields that become metadata columns, and their types. None takes the type that a
            column of the file has, and a string in text files.
        is_feed: Whether records of JSONL files may lack all fields but the id, as deletions do.
    """

    id: str | None = None
    text: str | None = None
    title: str | None = None
    format: str | None = None
    columns: tuple[str, ...] | None = None
    quoting: bool | None = None
    keep: tuple[tuple[str, str | None], ...] = ()
    is_feed: bool = False

    @property
    def keep_as_text(self) -> Columns:
        """The fields that become metadata columns; their types where the file tells none."""
        return tuple((name, type or "string") for name, type in self.keep)

    def detect(self, names: Iterable[str], path: str) -> Fields:
        """Choose the fields of one file among the names that it has.

        The guesses are tried as they are spelled, then in any case.

        Raises:
            InputError: If there is no id or text field, if a named field or one to keep is missing,
                or if a chosen one is there twice.
        """
        present = list(names)
        chosen = self.choose(present)
        wanted = {"id": ID_FIELDS, "text": TEXT_FIELDS, "title": TITLE_FIELDS}
        for role, name in chosen.items():
            named = getattr(self, role)
            if name is None and (named or role != "title"):
                raise InputError(
                    f"{path} has no {role} field {named or ', '.join(wanted[role])}; it has "
                    f"{shown_names(present)}. Name it with --{role}-field"
                )
            if name is not None and _times(name, present, named or name in wanted[role]) > 1:
                raise InputError(
                    f"{path} has more than one column {name!r}: rename all but one of them, or "
                    f"name another with --{role}-field"
                )
        for name, _ in self.keep:
            if (times := _times(name, present, True)) != 1:
                raise InputError(
                    f"{path} has {'no' if times == 0 else 'more than one'} field {name!r} to keep; "
                    f"it has {shown_names(present)}. Name another with --keep, or mend the file"
                )
        return Fields(str(chosen["id"]), str(chosen["text"]), chosen["title"], self.keep_as_text)

    def choose(self, present: Collection[str]) -> dict[str, str | None]:
        """Return the field of each role among the names that a file or a row has, or None."""
        text = _choose(self.text, TEXT_FIELDS, present)
        # In MS MARCO's passages `docid` is the document that the passage `pid` comes from.
        ids = ("pid", *ID_FIELDS) if text == "passage" else ID_FIELDS
        return {
            "id": _choose(self.id, ids, present),
            "text": text,
            "title": _choose(self.title, TITLE_FIELDS, present),
        }


def _choose(named: str | None, guesses: Iterable[str], present: Collection[str]) -> str | None:
    if named:
        return named if named in present else None
    folded = {name.casefold(): name for name in present}
    exact = (name for name in guesses if name in present)
    return next(exact, None) or next((folded[n] for n in guesses if n in folded), None)


def _times(name: str, present: Collection[str], as_spelled: object) -> int:
    if as_spelled:
        return sum(other == name for other in present)
    return sum(other.casefold() == name.casefold() for other in present)


def shown_names(names: Collection[str]) -> str:
    """Return names for a message, which a document in place of a name must not fill."""
    short = [n if len(n) <= SHOWN_CHARS else f"{n[:SHOWN_CHARS]}…" for n in names]
    more = [f"… ({len(short):,} in all)"] if len(short) > SHOWN_NAMES else []
    return ", ".join([repr(name)[1:-1] for name in short[:SHOWN_NAMES]] + more) or "none"


def to_rows(
    rows: Iterable[tuple[int, RawRow]], fields: Fields, path: str
) -> tuple[list[Passage], list[Reject]]:
    """Sort the (line, row) pairs of a file into passages and rejects, each in input order."""
    found = [to_passage(row, fields, path, line) for line, row in rows]
    passages = [row for row in found if isinstance(row, Passage)]
    return passages, [row for row in found if isinstance(row, Reject)]


def to_passage(row: RawRow, fields: Fields, path: str, line: int) -> Passage | Reject:
    """Make a passage from one row, or say why it is not one.

    Title and text are joined. An integer id becomes its decimal string. An empty text is legal.
    """
    if isinstance(row, str):
        return Reject(path, line, row)
    id_, text = row.get(fields.id), row.get(fields.text)
    title_field = fields.title or "title"
    title = row.get(title_field)
    if isinstance(id_, int) and not isinstance(id_, bool):
        id_ = str(id_)

    def reject(reason: str) -> Reject:
        return Reject(path, line, reason, id_ if isinstance(id_, str) and _is_utf8(id_) else None)

    if not isinstance(id_, str) or not id_:
        return reject(f"field {fields.id!r} holds no id: {_shown(row, fields.id)}")
    if not isinstance(text, str):
        return reject(f"field {fields.text!r} holds no text: {_shown(row, fields.text)}")
    if title is not None and not isinstance(title, str):
        return reject(f"field {title_field!r} holds no text: {_shown(row, title_field)}")
    joined = join_title(title or "", text)
    if len(joined) > MAX_TEXT_CHARS:
        return reject(f"text of {len(joined):,} characters, at most {MAX_TEXT_CHARS:,}: split it")
    if not _is_utf8(id_ + joined):
        return reject("not valid Unicode (undecodable bytes or a lone surrogate)")
    return Passage(id_, joined, line, title or "", text)


def join_title(title: str, text: str) -> str:
    """Return title and text in one, as BEIR joins them."""
    return f"{title} {text}".strip()


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "missing or null" + ("" if name in row else f"; the row has {shown_names(row)}")
    return f"{type(value).__name__} {str(value)[:40]!r}"
