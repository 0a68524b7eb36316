"""`kalm sync`: a complete table follows its corpus; only what changed is encoded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs.encode import print_summary
from jobs.options import StorageOptions, executor, parse_storage_options


def sync(
    inputs: Annotated[list[str], typer.Argument(help="All files of the new corpus.")],
    to: Annotated[str, typer.Option(help="The table to bring up to date.")],
    model: Annotated[str | None, typer.Option(help="Default: the one the table records.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the hub id.")] = None,
    delete_missing: Annotated[
        bool, typer.Option(help="Remove passages that are no longer in the corpus.")
    ] = False,
    dry_run: Annotated[bool, typer.Option(help="Print the counts and change nothing.")] = False,
    on_duplicate: Annotated[
        str, typer.Option(help="Passages of one id: error, first or last counts.")
    ] = "error",
    workers: Annotated[int | None, typer.Option(help="Ray workers; 0 encodes here.")] = None,
    cpus_per_worker: Annotated[int | None, typer.Option(help="CPUs a worker.")] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(help="GPUs a worker, such as 0.5; 0 uses CPUs. Default 1 if any."),
    ] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster.")] = None,
    shard_size: Annotated[int, typer.Option(help="Rows a shard.")] = 1000,
    id_field: Annotated[str | None, typer.Option(help="Field that holds the id.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field that holds the text.")] = None,
    title_field: Annotated[str | None, typer.Option(help="Field that holds the title.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the counts as JSON.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Encode new and changed passages, by id and text; readers switch when all is done."""
    execute = executor(workers, cpus_per_worker, address, gpus_per_worker=gpus_per_worker)

    from kalm_encoder.table.location import Location
    from kalm_encoder.table.spec import TableSpec
    from pipeline.corpus.passages import FieldOptions
    from pipeline.run.job import EncodeJob, plan_job
    from pipeline.upkeep import sync as syncing
    from pipeline.upkeep.compare import Comparison

    options = parse_storage_options(storage_option)
    spec = TableSpec.from_metadata(Location(to, options).dataset().schema.metadata, to)
    job = EncodeJob(
        inputs=tuple(inputs),
        uri=to,
        model=model or spec.model,
        revision=revision or (spec.revision if model is None else None),
        ratios=spec.ratios,
        store_dtype=spec.store_dtype,
        max_length=spec.max_length,
        keep_text=spec.keep_text,
        fields=FieldOptions(id_field, text_field, title_field),
        shard_size=shard_size,
        storage_options=options,
    )
    summary = None
    if dry_run:
        changes = Comparison(job, plan_job(job), on_duplicate).changes
    else:
        changes, summary = syncing.sync(
            job, execute, delete_missing=delete_missing, on_duplicate=on_duplicate
        )
    counts = {
        "unchanged": changes.unchanged,
        "changed": changes.changed,
        "new": changes.new,
        "missing": len(changes.missing),
        "rejected": len(changes.rejected),
    }
    if as_json:
        print(json.dumps(counts))
        return
    print(", ".join(f"{count:,} {name}" for name, count in counts.items()))
    if dry_run:
        print("dry run: nothing was written")
        return
    if summary:
        print_summary(summary, what=f"changes of {to}")
    print(f"{to} is up to date" + ("" if delete_missing else "; missing passages were kept"))
