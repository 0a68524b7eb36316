"""The held-out documentation as a collection in BEIR's layout, to judge the demo checkpoint by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import xxhash

from jobs.demo_training.documentation import held_out, standard_library, without_copies
from jobs.demo_training.questions import KINDS, collection
from jobs.demo_training.training import TEST_ONE_IN

QUERIES = 100
"""Queries of each kind."""


def write_collection(folder: Path) -> None:
    """Write the modules of this Python's standard library that were never trained on.

    Each document is cut by its kind (see questions.py); as many of each kind are asked, chosen by
    hash. What the collection holds depends on the version of Python.
    """
    documents = [d for d in standard_library() if held_out(d.source, TEST_ONE_IN)]
    cut = collection(without_copies(documents, of=()))
    passages = [
        {"_id": document.name, "text": question.passage if question else document.text}
        for document, question in cut
    ]
    asked = sorted(
        ((document, question) for document, question in cut if question is not None),
        key=lambda pair: xxhash.xxh3_64_intdigest(pair[0].name.encode(), seed=2),
    )
    queries: list[dict[str, str]] = []
    judgements = ["query-id\tcorpus-id\tscore\n"]
    for kind in KINDS:
        for document, question in [pair for pair in asked if pair[1].kind == kind][:QUERIES]:
            number = f"{kind}-{len(queries)}"
            queries.append({"_id": number, "text": question.query})
            judgements.append(f"{number}\t{document.name}\t1\n")
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write(folder / "corpus.jsonl", passages)
    _write(folder / "queries.jsonl", queries)
    (folder / "qrels" / "test.tsv").write_text("".join(judgements), encoding="utf-8")


def _write(file: Path, rows: Iterable[Mapping[str, str]]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("".join(lines), encoding="utf-8")
