"""`kalm warm`: fill a disk cache before anybody asks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs import options
from kalm_encoder.errors import InputError

ROWS_AT_ONCE = 1000
"""Number of rows that are read together."""


def warm(
    uri: options.Table,
    ids_file: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="Text file with one id per line.")
    ],
    disk_cache: options.DiskCacheFolder = None,
    disk_cache_gb: options.DiskCacheGb = None,
    ratio: Annotated[
        int | None,
        typer.Option(help="Ratio that requests will ask for. Default: the finest stored."),
    ] = None,
    version: options.Version = None,
    storage_option: options.StorageOptions = None,
) -> None:
    """Fill a disk cache with the states of passages, so that the first requests find them there."""
    from kalm_encoder.table.reader import PassageTable

    cache = options.open_disk_cache(disk_cache, disk_cache_gb)
    if cache is None:
        raise InputError("say which cache to fill: give --disk-cache DIR and --disk-cache-gb N")
    ids = list(dict.fromkeys(options.read_ids(ids_file)))
    if not ids:
        raise InputError(f"{ids_file} holds no id")
    table = PassageTable.open(
        uri,
        version=options.parse_version(version),
        storage_options=options.parse_storage_options(storage_option),
        disk_cache=cache,
    )
    stored = 0
    for start in range(0, len(ids), ROWS_AT_ONCE):
        stored += len(table.find(ids[start : start + ROWS_AT_ONCE], ratio=ratio))
    hits, misses = cache.lookups
    print(
        f"{stored:,} passages are stored, of which {hits:,} were in {disk_cache} and {misses:,} "
        f"were read; {len(ids) - stored:,} ids are not in the table"
    )
