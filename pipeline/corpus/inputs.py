"""Corpus files to passages: which files, which fields, which rows are usable.

Formats: JSONL (.jsonl, .ndjson), CSV, TSV, each plain or .gz/.zst; Parquet; a Lance/LanceDB table
(.lance). Local paths and any fsspec URL. A bad row becomes a Reject, never an exception.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec

from kalm_encoder.errors import InputError

ID_FIELDS = ("_id", "id", "doc_id", "docid", "pid")
TEXT_FIELDS = ("text", "contents", "content", "body", "passage")
TITLE_FIELDS = ("title",)
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".lance": "lance",
}
MAX_TEXT = 10_000_000
"""Characters of a passage: one beyond is no passage, and would be cut to max_length anyway."""
COMPRESSIONS = (".gz", ".zst")
S3_OPTIONS = {  # of s3fs, and the names Lance knows each by
    "key": ("aws_access_key_id", "access_key_id"),
    "secret": ("aws_secret_access_key", "secret_access_key"),
    "token": ("aws_session_token", "session_token", "aws_token", "token"),
    "endpoint_url": ("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"),
    "region": ("aws_region", "region", "aws_default_region", "default_region"),
    "anon": ("aws_skip_signature", "skip_signature"),
}


@dataclass(frozen=True, slots=True)
class Passage:
    """What is encoded and stored: an id and its text, title joined; and where it came from."""

    id: str
    text: str
    line: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Reject:
    """An input row that cannot be encoded, and why."""

    path: str
    line: int
    reason: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the columns or keys a passage is made from."""

    id: str
    text: str
    title: str | None = None

    @property
    def names(self) -> list[str]:
        """The fields to read."""
        return [self.id, self.text, *([self.title] if self.title else [])]


@dataclass(frozen=True, slots=True)
class FieldOptions:
    """Fields the user named; None is detected."""

    id: str | None = None
    text: str | None = None
    title: str | None = None

    def detect(self, names: Iterable[str], path: str) -> Fields:
        """Choose the fields of one file among those it has.

        Raises:
            InputError: no id or text field, or a named one is not there.
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
                looked = named or ", ".join(guesses)
                raise InputError(
                    f"{path} has no {role} field {looked}; it has {', '.join(present) or 'none'}. "
                    f"Name it with --{role}-field"
                )
            chosen[role] = found[0] if found else None
        return Fields(str(chosen["id"]), str(chosen["text"]), chosen["title"])


def expand_inputs(inputs: Sequence[str], storage_options: dict[str, str] | None) -> list[str]:
    """Turn paths, URLs and globs into files, in the order given and sorted within a glob.

    Raises:
        InputError: a path that is not there, a glob without match, a folder, or a file twice.
    """
    files: list[str] = []
    for given in inputs:
        if file_format(given) == "lance":
            files.append(absolute(given))
            continue
        try:
            fs, path = fsspec.core.url_to_fs(given, **fsspec_options(given, storage_options))
            found = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path]
            if not found or not fs.exists(found[0]):
                raise InputError(f"no file matches {given}")
            if fs.isdir(found[0]):
                raise InputError(f"{given} is a folder: name its files, such as {given}/*.jsonl")
        except (OSError, ValueError, ImportError) as error:
            raise InputError(f"cannot read {given}: {error}") from error
        remote = "://" in given
        files += [fs.unstrip_protocol(f) for f in found] if remote else found
    for file in files:
        file_format(file)
    file, times = Counter(files).most_common(1)[0]
    if times > 1:
        raise InputError(f"{file} is given more than once")
    return files


def absolute(path: str) -> str:
    """Return a local path as an absolute one; URLs stay as they are."""
    return path if "://" in path else os.path.abspath(path)


def file_format(path: str) -> str:
    """Return the format of a file by its name.

    Raises:
        InputError: none that can be read.
    """
    name = path.rstrip("/").rsplit("/", 1)[-1]
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    suffix = "." + name.rsplit(".", 1)[-1]
    if suffix not in FORMATS:
        raise InputError(
            f"{path} has no known format: expected a name in {', '.join(FORMATS)}"
            " (text formats also with .gz or .zst)"
        )
    return FORMATS[suffix]


def fsspec_options(url: str, storage_options: dict[str, str] | None) -> dict[str, Any]:
    """Translate Lance's storage options into those of the fsspec file system of `url`."""
    if not url.startswith(("s3://", "s3a://")):
        return {}
    given = {k.lower(): v for k, v in (storage_options or {}).items()}
    options: dict[str, Any] = {}
    for name, aliases in S3_OPTIONS.items():
        if found := [given[alias] for alias in aliases if alias in given]:
            options[name] = found[0]
    if "region" in options:
        options["client_kwargs"] = {"region_name": options.pop("region")}
    if "anon" in options:
        options["anon"] = options["anon"].lower() == "true"
    return options


def to_passage(
    record: Mapping[str, object], fields: Fields, path: str, line: int
) -> Passage | Reject:
    """Make a passage of one record, or say why not.

    Title and text are joined as BEIR does: `(title + " " + text).strip()`. An integer id becomes
    its decimal string. Empty text is legal.
    """
    raw_id, text = record.get(fields.id), record.get(fields.text)
    title = record.get(fields.title) if fields.title else None
    if isinstance(raw_id, int) and not isinstance(raw_id, bool):
        raw_id = str(raw_id)
    reason = None
    if not isinstance(raw_id, str) or not raw_id:
        reason = f"field {fields.id!r} holds no id: {_shown(raw_id)}"
    elif not isinstance(text, str):
        reason = f"field {fields.text!r} holds no text: {_shown(text)}"
    elif title is not None and not isinstance(title, str):
        reason = f"field {fields.title!r} holds no text: {_shown(title)}"
    if reason is None and isinstance(raw_id, str) and isinstance(text, str):
        joined = f"{title} {text}".strip() if isinstance(title, str) else text.strip()
        if len(joined) > MAX_TEXT:
            reason = f"text of {len(joined):,} characters, at most {MAX_TEXT:,}: split it"
        elif _encodable(raw_id + joined):
            return Passage(raw_id, joined, line)
        else:
            reason = "not valid Unicode (undecodable bytes or a lone surrogate)"
    shown = raw_id if isinstance(raw_id, str) and _encodable(raw_id) else None
    return Reject(path, line, reason or "unusable", shown)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(value: object) -> str:
    return "missing or null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
