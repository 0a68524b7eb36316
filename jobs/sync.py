"""`kalm sync`: bring a complete table up to date with its corpus; only what changed is encoded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jobs import options
from jobs.encode import print_summary
from kalm_encoder.errors import InputError


def sync(
    context: typer.Context,
    inputs: Annotated[
        list[str], typer.Argument(help="All files of the corpus: paths, folders, URLs or globs.")
    ],
    to: Annotated[str, typer.Option(help="Path or URL of the table to bring up to date.")],
    model: options.TableModel = None,
    revision: options.TableRevision = None,
    delete_missing: Annotated[
        bool,
        typer.Option(
            "--delete-missing",
            help="Delete passages that are not in the corpus any more. Leave it out when the "
            "inputs are only the new part of a corpus.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the counts and change nothing.")
    ] = False,
    is_feed: Annotated[
        bool,
        typer.Option(
            "--changes",
            help="The inputs are a feed of changes, as JSON lines in which `op` is upsert or "
            "delete; the last record of an id counts. What was applied before is skipped.",
        ),
    ] = False,
    since: Annotated[
        int | None,
        typer.Option(
            help="Version of the Lance table given as input that was synced last: only what "
            "changed in it since is compared, and what was deleted there is deleted."
        ),
    ] = None,
    on_duplicate: options.OnDuplicate = "error",
    dtype: options.Dtype = "auto",
    workers: options.Workers = None,
    cpus_per_worker: options.CpusPerWorker = None,
    gpus_per_worker: options.GpusPerWorker = None,
    address: options.Address = None,
    shard_size: options.ShardSize = 1000,
    id_field: options.IdField = None,
    text_field: options.TextField = None,
    title_field: options.TitleField = None,
    format: options.Format = None,
    columns: options.Columns = None,
    quoting: options.Quoting = None,
    index_column: options.IndexColumns = None,
    as_json: options.AsJson = False,
    storage_option: options.StorageOptions = None,
) -> None:
    """Encode new and changed passages, by id and text; readers switch when all is done.

    Metadata columns are those that the table has; where they changed alone, nothing is encoded.
    """
    execute = options.executor(
        context, workers, cpus_per_worker, address, gpus_per_worker=gpus_per_worker
    )
    from kalm_encoder.table.spec import TableSpec
    from pipeline.run.job import EncodeJob
    from pipeline.upkeep.sync import sync as bring_up_to_date

    if is_feed and (delete_missing or since is not None):
        raise InputError("--changes says what is deleted: leave --delete-missing and --since out")
    table = options.location(to, storage_option)
    spec = TableSpec.from_metadata(table.dataset().schema.metadata, to)
    job = EncodeJob(
        inputs=tuple(inputs),
        uri=to,
        model=model or spec.model,
        revision=revision or (spec.revision if model is None else None),
        ratios=spec.ratios,
        store_dtype=spec.store_dtype,
        compute_dtype=options.compute_dtype(dtype),
        max_length=spec.max_length,
        keep_text=spec.keep_text,
        fields=options.reading(id_field, text_field, title_field, columns, quoting, format),
        shard_size=shard_size,
        index_columns=tuple(index_column or ()),
        storage_options=table.options,
    )
    changes, summary = bring_up_to_date(
        job,
        execute,
        delete_missing=delete_missing,
        on_duplicate=on_duplicate,
        dry_run=dry_run,
        is_feed=is_feed,
        since=since,
    )
    counts = changes.counts()
    if is_feed:
        counts["deleted"] = counts.pop("missing")
    if as_json:
        print(json.dumps(counts))
        return
    for rare in ("metadata_changed", "surplus"):
        if not counts[rare]:
            del counts[rare]
    print(", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))
    if dry_run:
        print("dry run: nothing was written")
        return
    if summary:
        print_summary(summary, what=f"changes of {to}")
    kept = "" if delete_missing or is_feed else "; missing passages were kept"
    print(f"{to} is up to date{kept}")
