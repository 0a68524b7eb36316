"""`kalm status`: what a table holds, whether it is complete, and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.options import StorageOptions, check_folder, parse_storage_options
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from pipeline.estimate.check import Line


def status(
    uri: Annotated[str, typer.Argument(help="The table.")],
    plan: Annotated[
        Path | None, typer.Option(help="What `kalm plan --out` saved: compare it with the table.")
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(help="Draw the runs into this file: .html, .svg or .png. Needs [eval]."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the run that works on it, until it ends.")
    ] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks of --watch.")] = 2.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON; with --watch a line each look.")
    ] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Show model, ratios, rows, size against the floor, shards done and missing; or a run."""
    check_folder(figure)
    options = parse_storage_options(storage_option)
    if watch:
        if plan or figure:
            raise InputError("--watch shows a run that works: give it without --plan and --figure")
        from jobs.watch import watch as watch_run

        watch_run(uri, options, interval_s=interval, as_json=as_json)
        return
    facts = table_facts(uri, options)
    if figure:
        _draw(figure, uri, options)
    compared, hint = _compare(plan, uri, facts, options) if plan else ([], None)
    if as_json:
        lines = {"plan": [asdict(line) for line in compared], "plan_hint": hint}
        print(json.dumps({**facts, **lines} if plan else facts))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) and value > 9999 else value
        print(f"{name:<{width}}  {shown}")
    if compared:
        from jobs.plan_text import comparison_text

        print("\n" + comparison_text(compared))
        if hint:
            print(f"\n{hint}")


def _draw(figure: Path, uri: str, storage_options: dict[str, str] | None) -> None:
    """Draw what the table's run records hold."""
    from pipeline.run.records import read_records

    try:
        from jobs.evaluation.run_figure import draw_runs
    except ImportError as error:
        raise InputError(
            f"a figure needs {error.name}: pip install 'kalm-preencode[batch,eval]'"
        ) from error
    draw_runs(read_records(uri, storage_options), uri, figure)


def _compare(
    plan: Path, uri: str, facts: dict[str, Any], storage_options: dict[str, str] | None
) -> tuple[list[Line], str | None]:
    """Set a saved plan against what the table and its run records hold; with a hint."""
    from pipeline.estimate.check import compare, hint, read_plan
    from pipeline.run.records import read_records
    from pipeline.run.run_totals import totals

    runs = totals(read_records(uri, storage_options))
    lines = compare(read_plan(plan), facts, runs)
    return lines, hint(lines, facts)


def table_facts(uri: str, storage_options: dict[str, str] | None) -> dict[str, Any]:
    """Collect what `kalm status` prints; reads metadata and one small column."""
    import pyarrow.compute as pc

    from kalm_encoder.table.location import Location
    from kalm_encoder.table.reader import LIVE_TAG
    from kalm_encoder.table.spec import TableSpec
    from pipeline.table.claim import COMPLETE, EPOCH, LOADING, STATE
    from pipeline.table.ledger import EMPTY_SHARDS, GENERATION, NUM_ROWS, NUM_SHARDS, PLAN

    dataset = Location(uri, storage_options).dataset()
    spec = TableSpec.from_metadata(dataset.schema.metadata, uri)
    metadata = {k.decode(): v.decode() for k, v in dataset.schema.metadata.items()}
    fragments = [f.metadata for f in dataset.get_fragments()]
    rows = dataset.count_rows()
    tokens = pc.sum(dataset.to_table(columns=["num_tokens"])["num_tokens"]).as_py() or 0
    size = sum(file.file_size_bytes or 0 for f in fragments for file in f.files)
    num_shards, planned = int(metadata[NUM_SHARDS]), int(metadata[NUM_ROWS])
    empty = {n for n in metadata.get(EMPTY_SHARDS, "").split(",") if n}
    loading = metadata[STATE] == LOADING
    done = len(fragments) + len(empty) if loading else num_shards
    tags = dataset.tags.list()
    facts = {
        "table": uri,
        "state": "complete" if metadata[STATE] == COMPLETE and LIVE_TAG in tags else "incomplete",
        "model": spec.model,
        "revision": spec.revision or "local directory",
        "fingerprint": spec.fingerprint,
        "ratios": ",".join(map(str, spec.ratios)),
        "store_dtype": spec.store_dtype,
        "keep_text": spec.keep_text,
        "dim": spec.dim,
        "max_length": spec.max_length,
        "passages": rows,
        "tokens": tokens,
        "truncated": dataset.count_rows(filter="truncated"),
        "bytes": size,
        "bytes_per_token": round(size / tokens, 2) if tokens else 0.0,
        "floor_bytes_per_token": round(spec.bytes_per_token, 2),
        "shards": num_shards,
        "shards_done": done,
        "shards_missing": num_shards - done,
        "rows_planned": planned,
        "version": int(dataset.version),
        "live_version": tags[LIVE_TAG]["version"] if LIVE_TAG in tags else None,
        "versions": len(dataset.versions()),
        "fragments": len(fragments),
        "phase": metadata[STATE],
        "generation": int(metadata[GENERATION]),
        "epoch": int(metadata[EPOCH]),
        "format_version": spec.format_version,
        "library_version": spec.library_version,
    }
    if done == num_shards and metadata[PLAN] != "changed":
        facts["rows_rejected_or_repeated"] = planned - rows
    return facts
