"""`kalm truncate`: a smaller table from a bigger one, without a model."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import options


def truncate(
    context: typer.Context,
    uri: options.Table,
    to: Annotated[str, typer.Option(help="Table to write: a path or URL that ends in .lance.")],
    ratios: options.Ratios = None,
    store_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Type of the stored numbers: {options.STORE_DTYPES}. int8 halves a float16 "
            "table, int4 quarters it. Default: the same as before."
        ),
    ] = None,
    workers: options.StepWorkers = None,
    cpus_per_worker: options.StepCpusPerWorker = None,
    address: options.Address = None,
    storage_option: options.StorageOptions = None,
) -> None:
    """Write a complete table again at coarser ratios or in fewer bits; run it again to resume."""
    execute = options.executor(context, workers, cpus_per_worker, address, is_step=True)
    from pipeline.upkeep.truncate import truncate as convert

    summary = convert(
        uri,
        to,
        ratios=None if ratios is None else options.parse_ratios(ratios),
        store_dtype=store_dtype,
        storage_options=options.parse_storage_options(storage_option),
        execute=execute,
    )
    totals = summary.totals
    if summary.shards_encoded:
        spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in totals.stages.items())
        print(
            f"wrote {summary.shards_encoded} shards in {totals.seconds:.1f} s; worker time: {spent}"
        )
    print(f"{to} is complete: {summary.num_rows:,} passages")
