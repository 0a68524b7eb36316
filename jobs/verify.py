"""`kalm verify`: compare every row of a table with its checksums."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from jobs import options


def verify(
    context: typer.Context,
    uri: options.Table,
    version: options.Version = None,
    sample: Annotated[
        int,
        typer.Option(
            help="Rows to encode again and compare, to see whether the model here gives the states "
            "that are stored. Needs the model."
        ),
    ] = 0,
    model: options.TableModel = None,
    dtype: options.Dtype = "auto",
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            help="File, folder or glob of the corpus, whose passages the table must hold with the "
            "same texts and no others. May be repeated.",
        ),
    ] = None,
    id_field: options.IdField = None,
    text_field: options.TextField = None,
    title_field: options.TitleField = None,
    format: options.Format = None,
    columns: options.Columns = None,
    quoting: options.Quoting = None,
    workers: options.StepWorkers = None,
    cpus_per_worker: options.StepCpusPerWorker = None,
    address: options.Address = None,
    scratch: Annotated[
        str | None,
        typer.Option(
            help="Folder, or URL in the store of the table, that the workers can write and read. "
            "Give it for a large table that may only be read. Default: a folder in the table's."
        ),
    ] = None,
    as_json: options.AsJson = False,
    storage_option: options.StorageOptions = None,
) -> None:
    """Check all rows: checksums, finite values, shapes, unique ids.

    The exit code is 1 if a row is bad. A check that was stopped goes on by the same command.
    """
    execute = options.executor(context, workers, cpus_per_worker, address, is_step=True)
    from pipeline.upkeep.verify import verify as check

    report = check(
        uri,
        version=options.parse_version(version),
        storage_options=options.parse_storage_options(storage_option),
        sample=sample,
        model=model,
        dtype=options.compute_dtype(dtype),
        inputs=inputs or (),
        fields=options.reading(id_field, text_field, title_field, columns, quoting, format),
        execute=execute,
        scratch=scratch,
    )
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        for problem in report.problems:
            where = f" row {problem.id!r}:" if problem.id is not None else ""
            print(f"{problem.check}:{where} {problem.detail}")
        if report.largest_state_error is not None:
            print(
                f"sample of {sample}: states differ by at most {report.largest_state_error:.2g} "
                f"(relative), P(yes) by {report.largest_score_error:.2g}"
            )
        print(
            f"{uri} version {report.version}: {report.rows:,} rows checked, "
            f"{report.num_problems} problems"
        )
    if report.num_problems:
        raise typer.Exit(1)
