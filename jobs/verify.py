"""`kalm verify`: every row of a table against its checksums."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.options import StorageOptions, parse_storage_options


def verify(
    uri: Annotated[str, typer.Argument(help="The table.")],
    version: Annotated[
        str | None, typer.Option(help="Version number or tag; default live.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Encode so many rows again and compare.")] = 0,
    model: Annotated[
        str | None, typer.Option(help="Model for the sample; default the table's.")
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Corpus file or glob that must be there; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Check all rows: checksums, finite values, shapes, unique ids. Exit code 1 if any is bad."""
    from pipeline.upkeep.verify import verify as check

    report = check(
        uri,
        version=int(version) if version and version.isdigit() else version,
        storage_options=parse_storage_options(storage_option),
        sample=sample,
        model=model,
        inputs=tuple(inputs or ()),
    )
    if as_json:
        print(json.dumps(report.to_dict()))
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
