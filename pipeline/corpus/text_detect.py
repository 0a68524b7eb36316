"""Decides how a text file is read: its fields, its columns, what its quotes mean.

Where two readings are possible one of them is the default, `reading.py` says which was taken, and
an option chooses the other.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from kalm_encoder.errors import InputError
from pipeline.corpus.access import open_text, readable
from pipeline.corpus.cells import Cells, split_line
from pipeline.corpus.foreign import HEAD_BYTES, refuse_foreign
from pipeline.corpus.inputs import InputFile
from pipeline.corpus.passages import KNOWN_FIELDS, FieldOptions, Fields, shown_names
from pipeline.corpus.text import blank_characters, parse_json, records

SAMPLE_RECORDS = 100
"""Number of usable records of a JSONL file that are looked at for the names of its fields."""
SEARCHED_RECORDS = 10_000
"""Number of lines of a JSONL file in which usable records are looked for."""
MAX_HEADER_BYTES = 1 << 20
WITHOUT_HEADER = ("0", "1")
DELIMITERS = {"csv": ",", "tsv": "\t"}
DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}


def detect(
    file: InputFile, options: FieldOptions, storage_options: dict[str, str] | None
) -> tuple[Fields, Cells | None, bytes]:
    """Return the fields, how lines become cells (None for JSONL), and the header to skip.

    Raises:
        InputError: If the file cannot be read or decompressed, is something else than its name
            says, has no id or text field, or if its columns are not known.
    """
    path, format = file.path, file.format
    with readable(path), open_text(path, storage_options) as stream:
        head = stream.read(HEAD_BYTES)
        refuse_foreign(path, head, is_json=format == "jsonl")
        head += stream.readline() if len(head) == HEAD_BYTES else b""
        lines = chain(io.BytesIO(head), stream)
        if format == "jsonl":
            return _detect_json(path, lines, options), None, b""
        return _detect_cells(path, lines, DELIMITERS[format], options)


def _detect_json(path: str, lines: Iterator[bytes], options: FieldOptions) -> Fields:
    """Choose the fields by the records that have both an id and a text.

    A title needs no vote: each record that has one is read with it.
    """
    wanted = replace(options, title=None)
    names: dict[str, None] = {}
    parsed: dict[str, Any] = {}
    usable = 0
    for line in islice((line for line in lines if line.strip()), SEARCHED_RECORDS):
        row = parse_json(line)
        if isinstance(row, str):
            continue
        parsed = parsed or row
        chosen = wanted.choose(row)
        if chosen["id"] and chosen["text"]:
            usable += 1
            names |= dict.fromkeys(row)
        seen = options.title in names or not options.title
        if usable >= SAMPLE_RECORDS and seen and all(name in names for name, _ in options.keep):
            break
    # A file without a single object is no error yet: its rows are rejected, each with its line.
    if not parsed:
        return Fields("id", "text", keep=options.keep_as_text)
    present = names or dict.fromkeys(parsed)
    if options.is_feed:
        text = () if wanted.choose(present)["text"] else (options.text or "text",)
        present |= dict.fromkeys([*text, *(name for name, _ in options.keep)])
    return options.detect(present, path)


def _detect_cells(
    path: str, lines: Iterator[bytes], delimiter: str, options: FieldOptions
) -> tuple[Fields, Cells | None, bytes]:
    """Find out whether the first line is a header, and choose the fields among the columns.

    It is one if it has a name that is known, in any case, or that the user gave.
    """
    with_header = Cells((), delimiter, _quoting(options, "csv" if delimiter == "," else "line"))
    without = Cells((), delimiter, _quoting(options, "csv" if delimiter == "," else "none"))
    raw, first = _first_record(path, lines, with_header, without)
    if not first:
        return Fields("id", "text", keep=options.keep_as_text), without, b""
    named = {options.id, options.text, options.title}
    if options.columns:
        _check_columns(path, first, options)
        fields, cells = (
            options.detect(options.columns, path),
            replace(without, columns=options.columns),
        )
        return fields, _with_line_ends(cells, fields, raw), b""
    if any(cell in named or cell.casefold() in KNOWN_FIELDS for cell in first):
        cells = replace(with_header, columns=tuple(first), header=True)
        fields = options.detect(first, path)
        return fields, _with_line_ends(cells, fields, raw), raw
    if options.id or options.text:
        options.detect(first, path)  # raises and says which names there are
    if delimiter == "\t" and len(first) == 2 and not options.keep:
        return Fields(*WITHOUT_HEADER), replace(without, columns=WITHOUT_HEADER), b""
    raise InputError(
        f"the first line of {path} is no header with a known name: {shown_names(first)}."
        f"{_other_delimiter(first, delimiter)} If it is a header, name the fields with --id-field "
        "and --text-field; if it is a row, name the columns, such as --columns id,title,text"
    )


def _quoting(options: FieldOptions, default: str) -> str:
    return default if options.quoting is None else "rfc4180" if options.quoting else "none"


def _with_line_ends(cells: Cells, fields: Fields, first: bytes) -> Cells:
    """Return the cells with what the end of the first record says of the other lines' ends.

    Before Python 3.11.9, `csv` and pandas wrote a carriage return at the end of a cell without
    quotes. At the end of a text it is nothing; an id or a title would lose it.
    """
    without_cr = first.endswith(b"\n") and not first.endswith(b"\r\n")
    used = (fields.id, fields.title, *fields.kept_names)
    return replace(cells, no_cr=without_cr and cells.columns[-1] in used)


def _first_record(
    path: str, lines: Iterator[bytes], cells: Cells, without: Cells
) -> tuple[bytes, list[str]]:
    """Return the bytes up to the end of the first record that is not blank, and its cells.

    Args:
        path: Path of the file.
        lines: Its lines.
        cells: How it is read if the record is a header.
        without: How it is read if it is none. It serves where the quotes are those of no header.

    Raises:
        InputError: If the record cannot be cut into cells either way.
    """
    consumed, blank = b"", blank_characters(cells)
    for raw, found in records(lines, cells, path, limit=MAX_HEADER_BYTES):
        text = raw.decode("utf-8", "surrogateescape")
        text = text if consumed else text.removeprefix("\ufeff")
        consumed += raw
        if not raw.strip(blank):
            continue
        if found is None:
            found = split_line(text, cells)
        if isinstance(found, str) and not without.spans_lines:
            found = split_line(text, without)
        if isinstance(found, str):
            line = consumed.count(b"\n", 0, -1) + 1
            raise InputError(f"{path} line {line}: {found}. Mend the line, or give --no-quoting")
        return consumed, found
    return consumed, []


def _check_columns(path: str, first: list[str], options: FieldOptions) -> None:
    """Refuse names of columns that do not fit the first line of a file."""
    columns = options.columns or ()
    chosen = options.choose(first)
    if chosen["id"] and chosen["text"]:
        raise InputError(
            f"the first line of {path} is a header: {shown_names(first)}. Leave out --columns; "
            "--id-field, --text-field and --title-field choose among its names"
        )
    if len(first) != len(columns):
        raise InputError(
            f"the first line of {path} has {len(first)} columns, --columns names {len(columns)}: "
            f"{shown_names(first)}. Name all of them, in their order"
        )


def _other_delimiter(first: list[str], delimiter: str) -> str:
    """Return a sentence on what separates the cells, if the file's own delimiter does not."""
    if len(first) > 1:
        return ""
    counts = {name: first[0].count(d) for d, name in DELIMITER_NAMES.items()}
    likely = max(counts, key=lambda name: counts[name])
    own = DELIMITER_NAMES[delimiter]
    if not counts[likely]:
        return f" It has no {own}, which separate the cells of this format."
    remedy = {
        "tabs": "let its name end in .tsv", "commas": "let its name end in .csv"
    }.get(likely, f"write it with {own}")  # fmt: skip
    return f" Its cells seem to be separated by {likely}, not by {own}: {remedy}."
