"""`kalm truncate`: a smaller table from a bigger one, without a model."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.options import Ratios, StorageOptions, parse_ratios, parse_storage_options


def truncate(
    uri: Annotated[str, typer.Argument(help="A complete table.")],
    to: Annotated[str, typer.Option(help="The table to write.")],
    ratios: Ratios = None,
    store_dtype: Annotated[
        str | None, typer.Option(help="float16, float32, int8 or int4; default: the same.")
    ] = None,
    storage_option: StorageOptions = None,
) -> None:
    """Write a table at coarser ratios or in fewer bits. Run the same command again to resume."""
    from pipeline.upkeep.truncate import truncate as convert

    summary = convert(
        uri,
        to,
        ratios=None if ratios is None else parse_ratios(ratios),
        store_dtype=store_dtype,
        storage_options=parse_storage_options(storage_option),
    )
    print(f"{to} is complete: {summary.num_rows:,} passages")
