"""`kalm rerank`: score stored passages against a query."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.options import StorageOptions, parse_storage_options
from kalm_encoder.errors import InputError


def rerank(
    uri: Annotated[str, typer.Argument(help="The table.")],
    query: Annotated[str, typer.Option(help="The query.")],
    instruction: Annotated[str | None, typer.Option(help="The task, in words.")] = None,
    ids: Annotated[str | None, typer.Option(help="Candidates, with commas.")] = None,
    ids_file: Annotated[Path | None, typer.Option(help="Candidates, one a line.")] = None,
    search: Annotated[int | None, typer.Option(help="Candidates: the best N by BM25.")] = None,
    ratio: Annotated[int | None, typer.Option(help="Any multiple of a stored ratio.")] = None,
    cascade: Annotated[
        str | None, typer.Option(help="Stages ratio:keep, coarse first, such as 32:20,4.")
    ] = None,
    max_ms: Annotated[float | None, typer.Option(help="Time budget in milliseconds.")] = None,
    top_k: Annotated[int, typer.Option(help="How many to show; 0 shows all.")] = 10,
    model: Annotated[str | None, typer.Option(help="Default: what the table records.")] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of the model.")] = None,
    version: Annotated[str | None, typer.Option(help="Version or tag; default live.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    storage_option: StorageOptions = None,
) -> None:
    """Rerank candidates by P(yes), from stored states: the encoder is never loaded."""
    from kalm_encoder.rerank.reranker import Reranker

    if sum(option is not None for option in (ids, ids_file, search)) != 1:
        raise InputError("give the candidates with one of --ids, --ids-file or --search")
    reranker = Reranker.open(
        uri,
        model=model,
        revision=revision,
        version=int(version) if version is not None and version.isdigit() else version,
        storage_options=parse_storage_options(storage_option),
    )
    began = time.perf_counter()
    if search is not None:
        candidates = [i for i, _ in reranker.table.search(query, search)]
        if not candidates:
            print(f"kalm: full-text search finds nothing for {query!r}", file=sys.stderr)
    else:
        candidates = ids.split(",") if ids is not None else _read_ids(ids_file)
    results = reranker.rerank(
        query,
        candidates,
        instruction=instruction,
        ratio=ratio,
        top_k=top_k or None,
        cascade=None if cascade is None else parse_cascade(cascade),
        max_ms=max_ms,
    )
    rows: list[dict[str, Any]] = [
        {"id": r.id, "score": r.score, "margin": r.margin, "ratio": r.ratio} for r in results
    ]
    if as_json:
        print(json.dumps({"query": query, "results": rows}, ensure_ascii=False))
        return
    seconds = time.perf_counter() - began
    print(f"{query}\n{len(candidates)} candidates in {seconds * 1000:.0f} ms")
    texts = reranker.table.texts([r.id for r in results])
    for rank, result in enumerate(results, start=1):
        print(f"{rank:3}  {result.score:.4f}  {result.id}  {beginning(texts.get(result.id, ''))}")


def beginning(text: str, width: int = 70) -> str:
    """Return the beginning of a text on one line."""
    return " ".join(text[: 10 * width].split())[:width]


def parse_cascade(text: str) -> list[tuple[int, int | None]]:
    """Turn `32:20,4` into [(32, 20), (4, None)].

    Raises:
        InputError: it has another form.
    """
    stages: list[tuple[int, int | None]] = []
    try:
        for part in text.split(","):
            ratio, colon, keep = part.partition(":")
            stages.append((int(ratio), int(keep) if colon else None))
    except ValueError:
        raise InputError(f"a cascade has the form 32:20,4, not {text!r}") from None
    return stages


def _read_ids(file: Path | None) -> list[str]:
    if file is None or not file.is_file():
        raise InputError(f"no file {file} with ids")
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line]
