"""`kalm demo`: the whole path on this Python's own documentation, offline.

Collects docstrings, makes a small checkpoint with random weights, encodes with Ray, reranks.
"""

from __future__ import annotations

import ast
import json
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from kalm_encoder.errors import InputError

QUERIES = (
    "How do I read a compressed file line by line?",
    "run a function in another process and wait for its result",
    "difference between two dates in days",
)


def demo(
    folder: Annotated[Path, typer.Option(help="Where to put everything.")] = Path("demo"),
    workers: Annotated[int | None, typer.Option(help="As in `kalm encode`.")] = None,
) -> None:
    """Encode the standard library's documentation and rerank three queries from the table."""
    from transformers.utils import logging as transformers_logging

    from jobs.demo_model import make_checkpoint
    from jobs.encode import encode
    from jobs.rerank import beginning
    from kalm_encoder.rerank import Reranker

    transformers_logging.disable_progress_bar()
    began = time.monotonic()
    corpus, model, table = folder / "corpus.jsonl", folder / "model", folder / "passages.lance"
    if corpus.exists() and not (model / "config.json").exists():
        raise InputError(f"{folder} is half made: remove it and run again")
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        passages = list(standard_library_docs())
        make_checkpoint(model, (p["text"] for p in passages))
        corpus.write_text("".join(json.dumps(p) + "\n" for p in passages), encoding="utf-8")
        print(f"{len(passages):,} docstrings in {corpus}, a small checkpoint in {model}")
    encode([str(corpus)], to=str(table), model=str(model), ratios="4,32", workers=workers)
    reranker = Reranker.open(str(table))
    for query in QUERIES:
        ids = [i for i, _ in reranker.table.search(query, 50)]
        results = reranker.rerank(query, ids, top_k=3)
        texts = reranker.table.texts([r.id for r in results])
        print(f"\n{query}\n  best of {len(ids)} found by full-text search:")
        for result in results:
            print(f"  {result.score:.4f}  {result.id}: {beginning(texts[result.id])}")
    print(
        f"\nThe weights are random, so this ranking means nothing; the path is the real one.\n"
        f"corpus {corpus}, model {model}, table {table}, {time.monotonic() - began:.0f} s in all.\n"
        f"Try: kalm status {table}\n"
        f"     kalm rerank {table} --query 'parse command line arguments' --search 20\n"
        f"     kalm explore {table} --note 'Random weights: the ranking means nothing.'"
    )


def standard_library_docs() -> Iterator[dict[str, str]]:
    """Yield {_id, title, text} for each module, class and function docstring, sorted by name.

    Parses the sources without importing them.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        parts = file.relative_to(library).with_suffix("").parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        module = ".".join(part for part in parts if part != "__init__") or "builtins"
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates and deliberately broken files
        seen: set[str] = set()
        for name, node in _documented(tree, module):
            doc = ast.get_docstring(node)
            if doc and doc.strip() and name not in seen:
                seen.add(name)
                yield {"_id": name, "title": name, "text": doc.strip()}


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    yield name, node
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")
