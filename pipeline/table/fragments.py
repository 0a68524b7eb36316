"""Rows to one uncommitted Lance fragment. Writing is not committing: see ledger.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import lance
import pyarrow as pa
from lance.file import LanceFileReader
from lance.fragment import FragmentMetadata, write_fragments

from kalm_encoder.errors import KalmError, first_line
from kalm_encoder.table.location import Location

CHECKED_AT_ONCE = 32
CACHE_BYTES = 1 << 20


def open_to_write(location: Location) -> lance.LanceDataset:
    """Open the latest version of a table in a session that keeps next to no metadata.

    Lance's own would keep the manifest of every version this process sees (measured: 600 MB in the
    driver of 100,000 fragments) and the footer of every file it reads (500 MB when 20,000 are
    compacted).

    Raises:
        TableError: nothing there, or the store refused.
    """
    return location.dataset(metadata_cache_bytes=CACHE_BYTES)


def write_fragment(rows: pa.Table, dataset: lance.LanceDataset) -> str:
    """Write rows as one data file of `dataset`; return the fragment's metadata as JSON.

    Until a commit names it the file is invisible to every reader, so a crash leaves only an orphan.

    Args:
        rows: at least one; a materialised table, so that a retry inside Lance re-reads all of it.
        dataset: any version of the table.

    Raises:
        KalmError: Lance cut the rows into several fragments.
    """
    fragments = write_fragments(rows, dataset, mode="append", max_rows_per_file=2**31 - 1)
    if len(fragments) != 1 or fragments[0].physical_rows != rows.num_rows:
        sizes = [f.physical_rows for f in fragments]
        raise KalmError(f"{rows.num_rows} rows became fragments of {sizes}: lower --shard-size")
    return json.dumps(fragments[0].to_json())


def with_id(fragment: str, id: int) -> FragmentMetadata:
    """Return fragment metadata from its JSON under a fragment id chosen in advance."""
    metadata = FragmentMetadata.from_json(fragment)
    metadata.id = id
    return metadata


def check_written(fragments: Sequence[str], location: Location) -> None:
    """Check that the data files workers reported are there and hold what they reported.

    Lance commits a fragment whose file is gone or has other rows without a word. Many are opened
    at once: on an object store each takes tens of milliseconds.

    Raises:
        KalmError: one is not.
    """

    def check(fragment: str) -> None:
        metadata = FragmentMetadata.from_json(fragment)
        path = location / f"data/{metadata.files[0].path}"
        try:
            reader = LanceFileReader(path.uri, storage_options=path.options)
            rows = reader.metadata().num_rows
        except (OSError, ValueError) as error:
            raise KalmError(
                f"{path}, which a worker wrote, cannot be read: {first_line(error)}. Run again"
            ) from error
        if rows != metadata.physical_rows:
            raise KalmError(f"{path} holds {rows} rows, its worker wrote {metadata.physical_rows}")

    with ThreadPoolExecutor(CHECKED_AT_ONCE, "check") as pool:
        for _ in pool.map(check, fragments):
            pass
