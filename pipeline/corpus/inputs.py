"""Which files make up a corpus, and in which format each of them is.

Formats: JSONL (.jsonl, .ndjson, .json), CSV and TSV, each plain or .gz/.zst; Parquet (.parquet,
.pq); a Lance or LanceDB table (.lance). Globs and folders are expanded first; then the name of each
file tells its format, and `--format` that of the others. Knows names, not contents.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import fsspec
import xxhash

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import address
from pipeline.corpus.access import (
    COMPRESSIONS,
    absolute,
    check_ranges,
    open_store,
    readable,
    split_chain,
)
from pipeline.corpus.cells import Cells
from pipeline.corpus.hub import pinned
from pipeline.corpus.listing import base_name, has_pattern, look_up, matches

logger = logging.getLogger(__name__)

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".lance": "lance",
}
COLUMNAR = ("parquet", "lance")
"""The formats whose row ranges count rows; those of text files count bytes."""
NAMEABLE = ("jsonl", "csv", "tsv", "parquet")
"""What `--format` may say."""
SHOWN = 5
"""Most files that a message lists."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file of a corpus, or a Lance table.

    Attributes:
        path: Absolute path or URL.
        format: "jsonl", "csv", "tsv", "parquet" or "lance".
    """

    path: str
    format: str

    @property
    def is_columnar(self) -> bool:
        """Whether its format is columnar."""
        return self.format in COLUMNAR

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed or lies in an archive, so that it is only read from its start.

        This goes by its name, because it serves only to hand out work.
        """
        _, file, rest = split_chain(self.path)
        return bool(rest) or file_name(file).endswith(tuple(COMPRESSIONS))


@dataclass(frozen=True, slots=True)
class RowRange:
    """A run of consecutive rows of one file.

    Attributes:
        start: First decompressed byte (text) or first row (Parquet, Lance).
        length: Number of bytes (text) or rows (Parquet, Lance).
        first_line: Line of `start`, from 1 (row number in Parquet and Lance).
        num_rows: Number of records in it; blank lines do not count.
        content: Hash of what was planned, in hexadecimal.
        cells: How a CSV or TSV file is read; None elsewhere.
        version: Version of a Lance table; 0 elsewhere.
    """

    start: int
    length: int
    first_line: int
    num_rows: int
    content: str
    cells: Cells | None = None
    version: int = 0


def range_hash(content: str, start: int, num_rows: int) -> str:
    """Return the content hash of a row range from that of its whole file."""
    return xxhash.xxh3_128_hexdigest(f"{content} {start} {num_rows}".encode())


def expand_inputs(
    inputs: Sequence[str],
    storage_options: dict[str, str] | None,
    format: str | None = None,
    *,
    table: str = "",
) -> list[InputFile]:
    """Turn paths, URLs, globs and folders into files, in the order given and sorted within each.

    Args:
        inputs: Paths, URLs, globs and folders.
        storage_options: Options of the object store.
        format: Format of the files whose names tell none.
        table: Table that is left out where a folder or a glob holds it, because it is written.

    Raises:
        InputError: If a path does not exist or cannot be read, a glob has no match, a file is given
            twice, a format is not known, an HTTP server sends whole files only, or the hub cannot
            be asked.
    """
    if format not in (None, *NAMEABLE):
        raise InputError(f"--format {format!r} is not one of {', '.join(NAMEABLE)}")
    files = [file for given in inputs for file in _expand(given, storage_options, format, table)]
    path, times = Counter(file.path for file in files).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} is given more than once")
    if format and all(named_format(file.path) not in (None, format) for file in files):
        raise InputError(
            f"--format {format} has no effect: the names of all files tell another format, such "
            f"as {files[0].path}. Leave it out, or rename the files"
        )
    for file in files:
        if "::" not in file.path:  # a chain was looked at before it was listed
            check_ranges(file.path, storage_options)
    return files


def _expand(
    given: str, storage_options: dict[str, str] | None, format: str | None, table: str
) -> list[InputFile]:
    if not given.strip():
        raise InputError("an input is empty: is a variable of your shell not set?")
    if named_format(given) == "lance" and not has_pattern(split_chain(given)[1]):
        return [InputFile(address(given), "lance")]
    given = pinned(given)
    if "::" in given:
        _check_chain(given)
        check_ranges(given, storage_options)
    with readable(given):
        fs, path = open_store(absolute(given), storage_options)
        # A name may hold `[` or `?`, and a URL its query. One that holds `*` is found as well.
        there = None if "*" in path else look_up(fs, path) if path else {"type": "directory"}
        is_folder = there is not None and there["type"] == "directory"
        entries = matches(fs, path) if is_folder or not there else [{**there, "name": path}]
    for entry in entries:
        if entry["type"] == "other":
            raise InputError(f"{entry['name']} is no regular file: save its content to one first")
    url_of = _urls(absolute(given), path)
    paths = [url for url in (url_of(entry["name"]) for entry in entries) if url != table]
    if not paths:
        raise InputError(f"no file {'in' if there else 'matches'} {given}")
    known = [path for path in paths if format or named_format(path)]
    if is_folder and 0 < len(known) < len(paths):
        unknown = [path for path in paths if not named_format(path)]
        more = f" and {len(unknown) - SHOWN} more" if len(unknown) > SHOWN else ""
        logger.warning(
            "%s: not read, since their names tell no format: %s%s",
            given, ", ".join(unknown[:SHOWN]), more,
        )  # fmt: skip
        paths = known
    return [_with_format(path, format, storage_options) for path in paths]


def _check_chain(given: str) -> None:
    """Refuse a path with `::` that is no chain, which would be read as another file."""
    for part in given.split("::")[:-1]:
        if "://" not in part and part not in fsspec.available_protocols():
            raise InputError(
                f"{given}: `::` joins URLs, such as zip://corpus.jsonl::corpus.zip, and {part!r} "
                "is none. Rename the file if its name holds `::`"
            )


def _urls(url: str, path: str) -> Callable[[str], str]:
    """Return what makes a URL of a path found in a store.

    Args:
        url: The URL, perhaps a chain, that was given.
        path: The path of that URL in its store, which may lack its protocol and host.
    """
    before, file, after = split_chain(url)
    if after and "://" not in file:
        file += "://"  # `zip::corpus.zip` is short for all that is in it
    file = file.rstrip("/") if path else file
    pairs = zip(reversed(file), reversed(path), strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    in_url, in_store = file[: len(file) - same], path[: len(path) - same]
    return lambda found: f"{before}{in_url}{found.removeprefix(in_store)}{after}"


def _with_format(
    path: str, format: str | None, storage_options: dict[str, str] | None
) -> InputFile:
    known = named_format(path) or format
    if known:
        return InputFile(path, known)
    if file_name(path).lower().endswith(".zip"):
        inside = _expand(f"zip::{path}", storage_options, None, "")
        raise InputError(
            f"{path} is an archive: name the files in it that are the corpus, such as "
            f"{' '.join(file.path for file in inside[:SHOWN])}"
        )
    raise InputError(
        f"{path} has no known format: expected a name in {', '.join(FORMATS)} (text formats "
        f"also with {' or '.join(COMPRESSIONS)}), or --format {', '.join(NAMEABLE)}"
    )


def file_name(path: str) -> str:
    """Return the name of the file that a path, URL or chain leads to."""
    _, file, _ = split_chain(path)
    if file.startswith(("http://", "https://")):
        file = file.partition("?")[0]
    return base_name(file)


def named_format(path: str) -> str | None:
    """Return the format that the name of a file tells; None if it tells none."""
    name = text = file_name(path).lower()
    for suffix in COMPRESSIONS:
        text = text.removesuffix(suffix)
    _, dot, last = text.rpartition(".")
    format = FORMATS.get(dot + last)
    return None if format in COLUMNAR and text != name else format
