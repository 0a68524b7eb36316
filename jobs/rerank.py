"""`kalm rerank`: score stored passages against a query."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from jobs import options
from kalm_encoder.errors import InputError

if TYPE_CHECKING:
    from kalm_encoder.rerank.results import OnMissing


def rerank(
    uri: options.Table,
    query: Annotated[str, typer.Option(help="Text of the query.")],
    instruction: options.Instruction = None,
    system_instruction: options.SystemInstruction = None,
    ids: Annotated[str | None, typer.Option(help="Ids of the candidates, with commas.")] = None,
    ids_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="File with the candidates, one id per line."
        ),
    ] = None,
    search: Annotated[
        int | None, typer.Option(help="Take this many candidates from a full-text search (BM25).")
    ] = None,
    dtype: options.Dtype = "auto",
    where: Annotated[
        str | None,
        typer.Option(
            help="SQL predicate over the columns of the table, such as \"lang = 'en'\". Only "
            "passages that satisfy it are searched or ranked."
        ),
    ] = None,
    ratio: Annotated[
        int | None, typer.Option(help="A multiple of a stored ratio. Raise it for speed.")
    ] = None,
    cascade: Annotated[
        str | None, typer.Option(help="Stages ratio:keep, such as 32:20,4, for many candidates.")
    ] = None,
    max_ms: Annotated[
        float | None,
        typer.Option(help="Milliseconds to spend: coarse states for all, finer ones for the best."),
    ] = None,
    group_by: options.GroupBy = None,
    aggregate: options.Aggregate = "max",
    max_passages: options.MaxPassages = 8,
    on_missing: Annotated[
        str,
        typer.Option(
            help="What to do with ids that the table lacks: error, drop them, or rank them last. "
            "Change it when the candidates come from an index that is newer than the table."
        ),
    ] = "error",
    top_k: Annotated[int, typer.Option(help="Number of results to print; 0 prints all.")] = 10,
    model: options.TableModel = None,
    revision: options.TableRevision = None,
    version: options.Version = None,
    disk_cache: options.DiskCacheFolder = None,
    disk_cache_gb: options.DiskCacheGb = None,
    as_json: options.AsJson = False,
    storage_option: options.StorageOptions = None,
) -> None:
    """Rerank candidates by P(yes), from stored states: the encoder is never loaded."""
    from kalm_encoder.rerank.reranker import Reranker
    from kalm_encoder.rerank.results import passage_of

    if sum(option is not None for option in (ids, ids_file, search)) != 1:
        raise InputError("give the candidates with one of --ids, --ids-file or --search")
    reranker = Reranker.open(
        uri,
        model=model,
        revision=revision,
        version=options.parse_version(version),
        storage_options=options.parse_storage_options(storage_option),
        dtype=dtype,
        disk_cache=options.open_disk_cache(disk_cache, disk_cache_gb),
    )
    began = time.perf_counter()
    if ids is not None:
        candidates = options.split_list(ids)
    elif ids_file is not None:
        candidates = options.read_ids(ids_file)
    else:
        candidates = [i for i, _ in reranker.table.search(query, search, where=where)]
        if not candidates:
            print(f"kalm: full-text search finds nothing for {query!r}", file=sys.stderr)
    results = reranker.rerank(
        query,
        candidates,
        instruction=instruction,
        system_instruction=system_instruction,
        ratio=ratio,
        top_k=top_k or None,
        cascade=None if cascade is None else parse_cascade(cascade),
        max_ms=max_ms,
        where=where if search is None else None,
        on_missing=cast("OnMissing", on_missing),  # `rerank` refuses any other word
        group_by=group_by,
        aggregate=aggregate,
        max_passages=max_passages,
    )
    if as_json:
        rows = [
            asdict(result) | ({"margin": None} if result.ratio is None else {})  # JSON has no -inf
            for result in results
        ]
        print(json.dumps({"query": query, "results": rows}, ensure_ascii=False))
        return
    seconds = time.perf_counter() - began
    print(f"{query}\n{len(candidates)} candidates in {seconds * 1000:.0f} ms")
    texts = reranker.table.texts([passage_of(r) for r in results])
    for rank, result in enumerate(results, start=1):
        text = beginning(texts.get(passage_of(result), ""))
        print(f"{rank:3}  {result.score:.4f}  {result.id}  {text}")


def beginning(text: str, width: int = 70) -> str:
    """Return the beginning of a text on one line."""
    return " ".join(text[: 10 * width].split())[:width]


def parse_cascade(text: str) -> list[tuple[int, int | None]]:
    """Turn `32:20,4` into [(32, 20), (4, None)].

    Raises:
        InputError: The text has another form.
    """
    stages: list[tuple[int, int | None]] = []
    try:
        for part in text.split(","):
            ratio, colon, keep = part.partition(":")
            stages.append((int(ratio), int(keep) if colon else None))
    except ValueError:
        raise InputError(f"a cascade has the form 32:20,4, not {text!r}") from None
    return stages
