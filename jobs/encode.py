"""`kalm encode`: corpus files to a passage table; the same command again resumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs import options
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from pipeline.run.driver import Summary


def encode(
    context: typer.Context,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="Files, folders, URLs or globs: JSONL, CSV, TSV (also .gz, .zst), Parquet, .lance."
        ),
    ],
    to: Annotated[str, typer.Option(help="Table to write: a path or URL that ends in .lance.")],
    model: options.Model,
    revision: options.Revision = None,
    ratios: options.Ratios = "4",
    store_dtype: options.StoreDtype = "float16",
    dtype: options.Dtype = "auto",
    max_length: options.MaxLength = 1024,
    no_text: options.NoText = False,
    workers: options.Workers = None,
    cpus_per_worker: options.CpusPerWorker = None,
    gpus_per_worker: options.GpusPerWorker = None,
    address: options.Address = None,
    token_budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens per forward pass. Lower it when other programs need the memory of the "
            "device. Default: chosen from the device and its free memory."
        ),
    ] = None,
    shard_size: options.ShardSize = 1000,
    limit: Annotated[
        int | None, typer.Option(help="Encode only the first N rows, to try a corpus out.")
    ] = None,
    id_field: options.IdField = None,
    text_field: options.TextField = None,
    title_field: options.TitleField = None,
    format: options.Format = None,
    columns: options.Columns = None,
    quoting: options.Quoting = None,
    keep: options.Keep = None,
    index_column: options.IndexColumns = None,
    split: options.Split = None,
    overlap: options.Overlap = 0,
    max_rejected: Annotated[
        float,
        typer.Option(
            help="Largest share of rows that may be rejected before the run fails. Raise it for a "
            "corpus that is known to hold unusable rows."
        ),
    ] = 0.001,
    commit_every: Annotated[
        float,
        typer.Option(
            help="Least number of seconds between two commits. A killed run repeats about that "
            "much work: lower it where machines are often taken away."
        ),
    ] = 10.0,
    on_duplicate: options.OnDuplicate = "error",
    new_generation: Annotated[
        bool,
        typer.Option(
            "--new-generation",
            help="Begin a new generation in the same table, for another model or corpus. Readers "
            "keep the old rows until `kalm publish`.",
        ),
    ] = False,
    retry_rejects: Annotated[
        bool,
        typer.Option(
            "--retry-rejects",
            help="Encode only the rejected rows of a complete table, after they were mended in "
            "their files.",
        ),
    ] = False,
    storage_option: options.StorageOptions = None,
) -> None:
    """Encode passages into a Lance table. Run the same command again to resume."""
    execute = options.executor(
        context, workers, cpus_per_worker, address, gpus_per_worker=gpus_per_worker
    )
    from pipeline.run.driver import run
    from pipeline.run.job import EncodeJob

    if not 0 <= max_rejected <= 1:
        raise InputError(f"--max-rejected {max_rejected} must be a share between 0 and 1")
    job = EncodeJob(
        inputs=tuple(inputs),
        uri=to,
        model=model,
        revision=revision,
        ratios=options.parse_ratios(ratios),
        store_dtype=store_dtype,
        compute_dtype=options.compute_dtype(dtype),
        max_length=max_length,
        keep_text=not no_text,
        fields=options.reading(id_field, text_field, title_field, columns, quoting, format, keep),
        shard_size=shard_size,
        limit=limit,
        split=options.parse_split(split, overlap, max_length),
        token_budget=token_budget,
        max_rejected=max_rejected,
        commit_every_s=commit_every,
        on_duplicate=on_duplicate,
        new_generation=new_generation,
        index_columns=tuple(index_column or ()),
        storage_options=options.parse_storage_options(storage_option),
    )
    if retry_rejects:
        from pipeline.upkeep.sync import retry_rejects as retry

        again = retry(job, execute)
        if again:
            print_summary(again, what=f"rejected rows of {to}")
        else:
            print("no rejected row can be encoded yet: mend the rows in their files first")
        return
    print_summary(run(job, execute))


def print_summary(summary: Summary, what: str | None = None) -> None:
    """Print what a run did."""
    totals = summary.totals
    if summary.shards_encoded:
        print(
            f"encoded {summary.shards_encoded} shards in {totals.seconds:.1f} s: "
            f"{totals.tokens_per_s:,.0f} tokens/s, {totals.padding:.1%} padding, "
            f"{totals.truncated:,} passages truncated"
        )
        spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in totals.stages.items())
        print(f"worker time: {spent}")
    if summary.num_rejected:
        print(f"{summary.num_rejected:,} rows rejected: `kalm rejects` lists them with reasons")
    if summary.num_repeated:
        print(f"{summary.num_repeated:,} rows with a repeated id were dropped")
    state = "complete" if summary.shards_encoded else "already complete"
    print(f"{what or f'{summary.uri} is {state}'}: {summary.num_rows:,} passages")
    if not summary.live:
        print(
            "readers still see the previous generation: "
            f"`kalm publish {summary.uri}` makes this one live"
        )
