"""`kalm truncate`: a smaller table from a bigger one, without a model."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.encode import parse_ratios
from jobs.options import StorageOptions, parse_storage_options


def truncate(
    uri: Annotated[str, typer.Argument(help="A complete table.")],
    to: Annotated[str, typer.Option(help="The table to write.")],
    ratio: Annotated[int | None, typer.Option(help="Tokens a stored state.")] = None,
    ratios: Annotated[str | None, typer.Option(help="Several ratios, finest first: 8,32.")] = None,
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
        ratios=parse_ratios(ratio, ratios),
        store_dtype=store_dtype,
        storage_options=parse_storage_options(storage_option),
    )
    print(f"{to} is complete: {summary.num_rows:,} passages")
