"""Writes to Lance: a dataset that is begun, and data files that no version names yet.

ledger.py commits such files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import lance
import pyarrow as pa
import xxhash
from lance.file import LanceFileReader
from lance.fragment import FragmentMetadata, write_fragments

from kalm_encoder.errors import KalmError, TableError, first_line
from kalm_encoder.table.location import Location

CHECKED_AT_ONCE = 32
"""Data files opened at the same time: on an object store each takes tens of milliseconds."""
METADATA_CACHE_BYTES = 1 << 20
"""Most metadata that Lance keeps in memory for a process that writes."""
INDEX_CACHE_BYTES = 64 << 20
"""Most bytes of indexes that it keeps; its own limit is 6 GB."""


def open_to_write(location: Location) -> lance.LanceDataset:
    """Open the latest version of a table in a session that keeps next to no metadata.

    With its own limits Lance would keep the manifest of every version that this process sees
    (measured: 600 MB in the driver of 100,000 fragments) and the footer of every file it reads
    (500 MB when 20,000 fragments are compacted).

    Raises:
        TableError: If there is no table, or the store refuses.
    """
    return location.dataset(
        metadata_cache_bytes=METADATA_CACHE_BYTES, index_cache_bytes=INDEX_CACHE_BYTES
    )


def open_version(location: Location, version: int) -> lance.LanceDataset:
    """Open one version of a table in such a session, to do a part of a step.

    Raises:
        TableError: If there is no table or no such version, or the store refuses.
    """
    try:
        return open_to_write(location).checkout_version(version)
    except (ValueError, OSError) as error:
        raise TableError(
            f"version {version} of {location} cannot be read: {first_line(error)}. If another "
            "command removed it meanwhile, run this one again"
        ) from error


def fragment_groups(dataset: lance.LanceDataset, most_rows: int) -> list[list[int]]:
    """Return the ids of all fragments in groups of consecutive ones with about `most_rows` rows."""
    groups: list[list[int]] = []
    room = 0
    for fragment in dataset.get_fragments():
        rows = fragment.metadata.num_rows
        if not groups or rows > room:
            groups.append([])
            room = most_rows
        groups[-1].append(fragment.fragment_id)
        room -= rows
    return groups


def fragments_key(dataset: lance.LanceDataset) -> str:
    """Return a hash of which rows a version has and in which files; claims do not change it."""
    hash = xxhash.xxh3_128()
    for fragment in dataset.get_fragments():
        metadata = fragment.metadata.to_json()
        named = [metadata["id"], metadata["files"], metadata["deletion_file"]]
        hash.update(json.dumps(named, sort_keys=True).encode())
    return hash.hexdigest()


def write_once(
    rows: pa.Table | Iterable[pa.RecordBatch], location: Location, schema: pa.Schema
) -> None:
    """Create a Lance dataset of these rows unless there is one; another process may do the same.

    Raises:
        OSError: If the store refuses.
    """
    try:
        lance.write_dataset(
            rows,
            location.uri,
            schema=schema,
            mode="create",
            data_storage_version="2.2",
            enable_stable_row_ids=True,
            storage_options=location.options,
        )
    except OSError as error:
        if "already exists" not in str(error):
            raise


def write_fragment(rows: pa.Table, dataset: lance.LanceDataset) -> str:
    """Write rows as one data file of `dataset` and return the fragment's metadata as JSON.

    No reader sees the file until a commit names it, so a crash leaves only an unused file.

    Args:
        rows: At least one row, in memory: if Lance retries, it can read all of them again.
        dataset: Any version of the table.

    Raises:
        KalmError: If Lance cut the rows into several fragments.
    """
    fragments = write_fragments(rows, dataset, mode="append", max_rows_per_file=2**31 - 1)
    if len(fragments) != 1 or fragments[0].physical_rows != rows.num_rows:
        sizes = [f.physical_rows for f in fragments]
        raise KalmError(f"{rows.num_rows} rows became fragments of {sizes}: lower --shard-size")
    return json.dumps(fragments[0].to_json())


def with_id(fragment: str, id: int) -> FragmentMetadata:
    """Return the metadata that `fragment` holds as JSON, with the given fragment id."""
    metadata = FragmentMetadata.from_json(fragment)
    metadata.id = id
    return metadata


def check_written(fragments: Sequence[str], table: Location) -> None:
    """Check that the data files which workers reported exist and hold what was reported.

    Lance itself commits a fragment without complaint if its file is missing or has other rows.

    Raises:
        KalmError: If a file is missing or holds another number of rows.
    """

    def check(fragment: str) -> None:
        metadata = FragmentMetadata.from_json(fragment)
        file = table / f"data/{metadata.files[0].path}"
        try:
            reader = LanceFileReader(file.uri, storage_options=file.options)
            rows = reader.metadata().num_rows
        except (OSError, ValueError) as error:
            raise KalmError(
                f"{file}, which a worker wrote, cannot be read: {first_line(error)}. Run again"
            ) from error
        if rows != metadata.physical_rows:
            raise KalmError(f"{file} holds {rows} rows, its worker wrote {metadata.physical_rows}")

    with ThreadPoolExecutor(CHECKED_AT_ONCE, "check") as pool:
        list(pool.map(check, fragments))
