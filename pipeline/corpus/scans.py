"""Opens input files of any format and scans them: which fields and which row ranges they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.corpus.columnar import LanceTable, ParquetFile
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import FieldOptions, Fields
from pipeline.corpus.text_scan import TextFile

CorpusFile = TextFile | ParquetFile | LanceTable
"""An input file: it is cut into row ranges by `scan`, and they are read again by `read`."""
READERS: dict[str, type[CorpusFile]] = {"parquet": ParquetFile, "lance": LanceTable}
"""The class that reads a format of `inputs.FORMATS`; TextFile reads all others."""
Scan = tuple[Fields, list[RowRange]]
"""Where the passages are in a file, and the row ranges of the file."""
ScanFiles = Callable[[Sequence[InputFile], int, FieldOptions, dict[str, str] | None], list[Scan]]
"""Scans whole files into ranges of so many rows; the last argument are the store's options."""


def open_file(file: InputFile, storage_options: dict[str, str] | None) -> CorpusFile:
    """Open an input file with the reader of its format.

    Raises:
        InputError: If the file cannot be opened.
    """
    return READERS.get(file.format, TextFile)(file, storage_options)


def scan_in_threads(
    files: Sequence[InputFile],
    shard_size: int,
    options: FieldOptions,
    storage_options: dict[str, str] | None,
) -> list[Scan]:
    """Scan files in this process, several at once.

    Raises:
        InputError: If a file cannot be read, or not be cut into rows.
    """

    def scan(file: InputFile) -> Scan:
        return open_file(file, storage_options).scan(shard_size, None, options)

    # Scanning waits for the store and works without the interpreter lock: threads pay off.
    with ThreadPoolExecutor(thread_name_prefix="plan") as pool:
        return list(pool.map(scan, files))


def scan_first_rows(
    files: Sequence[InputFile],
    limit: int,
    shard_size: int,
    options: FieldOptions,
    storage_options: dict[str, str] | None,
) -> list[Scan]:
    """Scan files one after the other, until they have `limit` rows together.

    Raises:
        InputError: If a file cannot be read, or not be cut into rows.
    """
    scans: list[Scan] = []
    left = limit
    for file in files:
        if left > 0:
            scans.append(open_file(file, storage_options).scan(shard_size, left, options))
            left -= sum(rows.num_rows for rows in scans[-1][1])
    return scans
