"""Which files make up a corpus, in which format each is, and how it is opened.

Formats: JSONL (.jsonl, .ndjson), CSV and TSV, each plain or .gz/.zst; Parquet; a Lance or LanceDB
table (.lance). Paths may be local or any fsspec URL. Knows names, not contents.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow as pa
import xxhash

from kalm_encoder.errors import InputError

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".lance": "lance",
}
COMPRESSIONS = (".gz", ".zst")
S3_OPTIONS = {  # names that s3fs uses, each with the names under which Lance knows the option
    "key": ("aws_access_key_id", "access_key_id"),
    "secret": ("aws_secret_access_key", "secret_access_key"),
    "token": ("aws_session_token", "session_token", "aws_token", "token"),
    "endpoint_url": ("aws_endpoint", "aws_endpoint_url", "endpoint", "endpoint_url"),
    "region": ("aws_region", "region", "aws_default_region", "default_region"),
    "anon": ("aws_skip_signature", "skip_signature"),
}


@dataclass(frozen=True, slots=True)
class RowRange:
    """A run of consecutive rows of one file.

    Attributes:
        start: First decompressed byte (text) or first row (Parquet, Lance).
        length: Number of bytes (text) or rows (Parquet, Lance).
        first_line: Line of `start`, from 1 (row number in Parquet and Lance).
        num_rows: Number of records in it; blank lines do not count.
        content: Hash of what was planned, in hexadecimal.
        columns: Columns of a CSV or TSV file, in the order of the file; empty elsewhere.
        version: Version of a Lance table; 0 elsewhere.
    """

    start: int
    length: int
    first_line: int
    num_rows: int
    content: str
    columns: tuple[str, ...] = ()
    version: int = 0


def range_hash(content: str, start: int, num_rows: int) -> str:
    """Return the content hash of a row range from that of its whole file."""
    return xxhash.xxh3_128_hexdigest(f"{content} {start} {num_rows}".encode())


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn what a store, a decompressor or a library raises into an InputError about the file."""
    try:
        yield
    except (OSError, EOFError, ValueError, ImportError, pa.ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def expand_inputs(inputs: Sequence[str], storage_options: dict[str, str] | None) -> list[str]:
    """Turn paths, URLs and globs into files, in the order given and sorted within a glob.

    Raises:
        InputError: If a path does not exist, a glob has no match, an input is a folder, or a file
            is given twice.
    """
    files: list[str] = []
    for given in inputs:
        if file_format(given) == "lance":
            files.append(absolute(given))
            continue
        with readable(given):
            fs, path = fsspec.core.url_to_fs(given, **fsspec_options(given, storage_options))
            found = sorted(fs.glob(path)) if any(c in path for c in "*?[") else [path]
            if not found or not fs.exists(found[0]):
                raise InputError(f"no file matches {given}")
            if fs.isdir(found[0]):
                raise InputError(f"{given} is a folder: name its files, such as {given}/*.jsonl")
        files += [fs.unstrip_protocol(f) for f in found] if "://" in given else found
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
    """Return the format of a file, which its name alone decides.

    Raises:
        InputError: If no format has such names.
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


def is_columnar(path: str) -> bool:
    """Return whether the row ranges of a file count rows; those of text files count bytes."""
    return file_format(path) in ("parquet", "lance")


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
