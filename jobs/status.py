"""`kalm status`: what a table holds, whether it is complete, and how the runs that made it went."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import AsJson, StorageOptions, Table, check_folder, location, needs_extra
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from kalm_encoder.table.location import Location
    from pipeline.estimate.check import Line


def status(
    uri: Table,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Compare the table with the estimate that `kalm plan --out` saved in this file."
        ),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw the speed of the runs that made the table into this file: .html, .svg or "
            ".png. Needs [eval]."
        ),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the run that works on the table, until it ends.")
    ] = False,
    interval: Annotated[
        float,
        typer.Option(
            help="Seconds between two looks of --watch. Raise it when the output goes to a log."
        ),
    ] = 2.0,
    as_json: AsJson = False,
    storage_option: StorageOptions = None,
) -> None:
    """Show what a table holds and which shards are missing, or watch the run that works on it."""
    check_folder(figure)
    table = location(uri, storage_option)
    if watch:
        if plan or figure:
            raise InputError("--watch shows a run that works: give it without --plan and --figure")
        from jobs.watch import watch as watch_run

        watch_run(table, interval_s=interval, as_json=as_json)
        return
    from pipeline.upkeep.facts import table_facts

    facts = table_facts(table)
    if figure:
        draw(figure, table)
    compared, hint = _compare(plan, table, facts) if plan else ([], None)
    if as_json:
        lines = {"plan": [asdict(line) for line in compared], "plan_hint": hint}
        print(json.dumps({**facts, **lines} if plan else facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and value > 9999 else value
        print(f"{name:<{width}}  {shown}")
    if compared:
        from jobs.plan_text import print_comparison

        print_comparison(compared)
        if hint:
            print(f"\n{hint}")


def draw(figure: Path, table: Location) -> None:
    """Draw what the records of the table's runs hold.

    Raises:
        InputError: The file's suffix is unknown, there are no records, or a library is missing.
    """
    from pipeline.run.records import read_records

    with needs_extra("batch,eval"):
        from jobs.evaluation.run_figure import draw_runs
    draw_runs(read_records(table), table.uri, figure)


def _compare(plan: Path, table: Location, facts: dict[str, Any]) -> tuple[list[Line], str | None]:
    """Return a saved estimate against the table and its records, line by line, and a hint."""
    from pipeline.estimate.check import compare, hint, read_plan
    from pipeline.run.records import read_records, totals

    lines = compare(read_plan(plan), facts, totals(read_records(table)))
    return lines, hint(lines, facts)
