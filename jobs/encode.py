"""`kalm encode`: corpus files to a passage table; the same command again resumes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import StorageOptions, executor, parse_storage_options
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from pipeline.run.driver import Summary


def encode(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Files, URLs or globs: JSONL, CSV, TSV (.gz, .zst), Parquet, .lance."),
    ],
    to: Annotated[str, typer.Option(help="Table to write, a path or URL ending in .lance.")],
    model: Annotated[str, typer.Option(help="Hub id or directory of a KaLM reranker.")],
    revision: Annotated[str | None, typer.Option(help="Revision of the hub id.")] = None,
    ratio: Annotated[int | None, typer.Option(help="Tokens a stored state (default 4).")] = None,
    ratios: Annotated[str | None, typer.Option(help="Several ratios, finest first: 4,32.")] = None,
    store_dtype: Annotated[str, typer.Option(help="float16, float32, int8 or int4.")] = "float16",
    max_length: Annotated[int, typer.Option(help="Tokens a passage is cut to.")] = 1024,
    no_text: Annotated[bool, typer.Option("--no-text", help="Do not store the raw text.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Ray workers; 0 encodes in this process. Default: all there is room for."
        ),
    ] = None,
    cpus_per_worker: Annotated[
        int | None, typer.Option(help="CPUs a worker; default up to 4.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(help="GPUs a worker, such as 0.5; 0 uses CPUs. Default 1 if any."),
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="Ray cluster; default RAY_ADDRESS, else this machine.")
    ] = None,
    token_budget: Annotated[int | None, typer.Option(help="Tokens a forward pass.")] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Run the encoder through torch.compile.")
    ] = False,
    shard_size: Annotated[int, typer.Option(help="Rows a shard.")] = 1000,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows.")] = None,
    id_field: Annotated[str | None, typer.Option(help="Field that holds the id.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field that holds the text.")] = None,
    title_field: Annotated[str | None, typer.Option(help="Field that holds the title.")] = None,
    max_rejected: Annotated[
        float, typer.Option(help="Largest share of rows that may be rejected.")
    ] = 0.001,
    commit_every: Annotated[
        float, typer.Option(help="Seconds between commits at least; what a crash may repeat.")
    ] = 10.0,
    on_duplicate: Annotated[
        str, typer.Option(help="Rows of one id: error, or keep the first or last.")
    ] = "error",
    new_generation: Annotated[
        bool, typer.Option(help="Replace a complete table; readers switch with `kalm publish`.")
    ] = False,
    retry_rejects: Annotated[
        bool, typer.Option(help="Encode only the rejected rows of a complete table again.")
    ] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Encode passages into a Lance table. Run the same command again to resume."""
    execute = executor(workers, cpus_per_worker, address, gpus_per_worker=gpus_per_worker)
    from pipeline.corpus.inputs import FieldOptions
    from pipeline.run.driver import run
    from pipeline.run.job import EncodeJob

    if not 0 <= max_rejected <= 1:
        raise InputError(f"--max-rejected {max_rejected} must be a share between 0 and 1")
    job = EncodeJob(
        inputs=tuple(inputs),
        uri=to,
        model=model,
        revision=revision,
        ratios=parse_ratios(ratio, ratios) or (4,),
        store_dtype=store_dtype,
        max_length=max_length,
        keep_text=not no_text,
        fields=FieldOptions(id_field, text_field, title_field),
        shard_size=shard_size,
        limit=limit,
        token_budget=token_budget,
        compile=compile,
        max_rejected=max_rejected,
        commit_every_s=commit_every,
        on_duplicate=on_duplicate,
        new_generation=new_generation,
        storage_options=parse_storage_options(storage_option),
    )
    if retry_rejects:
        from pipeline.upkeep.sync import retry_rejects as retry

        again = retry(job, execute)
        if again:
            print_summary(again, what=f"rejected rows of {to}")
        else:
            print("no rejected row can be read as a passage")
        return
    print_summary(run(job, execute))


def print_summary(summary: Summary, what: str | None = None) -> None:
    """Print what a run did."""
    if summary.shards_encoded:
        print(
            f"encoded {summary.shards_encoded} shards in {summary.elapsed_s:.1f} s: "
            f"{summary.tokens_per_s:,.0f} tokens/s, {summary.padding:.1%} padding, "
            f"{summary.truncated:,} passages truncated"
        )
        spent = ", ".join(f"{stage} {s:.1f} s" for stage, s in summary.seconds.items())
        print(f"worker time: {spent}")
    if summary.num_rejected:
        print(f"{summary.num_rejected:,} rows rejected: `kalm rejects` lists them with reasons")
    if summary.num_repeated:
        print(f"{summary.num_repeated:,} rows dropped that repeat an id")
    state = "complete" if summary.shards_encoded else "already complete"
    print(f"{what or f'{summary.uri} is {state}'}: {summary.num_rows:,} passages")
    if not summary.live:
        print(f"readers still see the generation before: `kalm publish {summary.uri}` switches")


def parse_ratios(ratio: int | None, ratios: str | None) -> tuple[int, ...] | None:
    """Turn --ratio 4 into (4,) and --ratios 4,32 into (4, 32); neither is None.

    Raises:
        InputError: both, or not numbers.
    """
    if ratio is not None and ratios is not None:
        raise InputError("give --ratio or --ratios, not both")
    if ratios is None:
        return None if ratio is None else (ratio,)
    try:
        return tuple(int(part) for part in ratios.split(","))
    except ValueError:
        raise InputError(f"--ratios {ratios!r} must be numbers with commas, such as 4,32") from None
