"""`kalm demo`: the whole path on this Python's own documentation, offline, with real rankings.

It collects docstrings, encodes them with the checkpoint that ships, and answers questions about
Python from the table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import Workers

if TYPE_CHECKING:
    from kalm_encoder.rerank.reranker import Reranker

QUESTIONS = (
    "sort a list by a key",
    "which day of the week is a date?",
    "copy a file with its permissions",
    "How do I read a compressed file line by line?",
)
CANDIDATES, SHOWN = 50, 3
"""Passages per question that full-text search finds, and that are printed."""


def demo(
    context: typer.Context,
    folder: Annotated[Path, typer.Option(help="Folder for the corpus and the table.")] = Path(
        "demo"
    ),
    workers: Workers = None,
) -> None:
    """Encode the standard library's documentation and answer questions from the table."""
    from transformers.utils import logging as transformers_logging

    from jobs.encode import encode
    from kalm_encoder.model.checkpoint import DEMO_CHECKPOINT, DEMO_NAME
    from kalm_encoder.rerank.reranker import Reranker

    transformers_logging.disable_progress_bar()
    began = time.monotonic()
    corpus, table = folder / "corpus.jsonl", folder / "passages.lance"
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(passage) + "\n" for passage in standard_library_docs()]
        corpus.with_suffix(".part").write_text("".join(lines), encoding="utf-8")
        corpus.with_suffix(".part").rename(corpus)
        print(f"{len(lines):,} docstrings in {corpus}")
    encode(context, [str(corpus)], to=str(table), model=DEMO_NAME, ratios="4,32", workers=workers)
    reranker = Reranker.open(str(table))
    for question in QUESTIONS:
        _answer(reranker, question)
    print(
        f"\n{quality(DEMO_CHECKPOINT)}\n"
        f"corpus {corpus}, table {table}, {time.monotonic() - began:.0f} s in all.\n"
        f"Try: kalm rerank {table} --query 'parse command line arguments' --search 50\n"
        f"     kalm explore {table}          (a page to try ratios on)\n"
        f"     kalm evaluate --demo          (how well it ranks, measured here)"
    )


def _answer(reranker: Reranker, question: str) -> None:
    """Print the first passages of full-text search alone, and of search and reranker together."""
    from jobs.rerank import beginning
    from kalm_encoder.rerank.fusion import fuse

    first = dict(reranker.table.search(question, CANDIDATES))
    results = reranker.rerank(question, list(first))
    fused = fuse(first, {r.id: r.margin for r in results})
    best = sorted(fused, key=lambda i: (-fused[i], i))[:SHOWN]
    scores = {r.id: r.score for r in results}
    texts = reranker.table.texts(best)
    places = {i: place for place, i in enumerate(first, start=1)}
    print(f"\n{question}")
    print(f"  full-text search alone: {', '.join(list(first)[:SHOWN])}")
    for i in best:
        print(f"  P(yes) {scores[i]:.2f}, was {places[i]:2}  {beginning(texts[i], 80)}")


def quality(checkpoint: Path) -> str:
    """Return one sentence on how well a checkpoint ranks, as measured when it was trained."""
    measured = json.loads((checkpoint / "held_out.json").read_text(encoding="utf-8"))
    metrics = {name: f"{value:.3f}" for name, value in measured["ndcg@10"].items()}
    return (
        "The rankings are those of a demo checkpoint: 3.5 million parameters, trained for an hour, "
        "no KaLM.\nOn modules it never saw, nDCG@10 is "
        f"{metrics['bm25']} for full-text search and {metrics['r4+bm25']} for both together "
        f"(r = 4; r = 32: {metrics['r32+bm25']})."
    )


def standard_library_docs() -> Iterator[dict[str, str]]:
    """Yield {_id, title, text} of each docstring of the standard library; repeated texts once."""
    from jobs.demo_training.documentation import standard_library, without_copies

    for document in without_copies(standard_library(), of=()):
        yield {"_id": document.name, "title": document.name, "text": document.text}
