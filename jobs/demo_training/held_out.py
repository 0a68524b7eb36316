"""The held-out documentation as a collection in BEIR's layout, to judge the demo checkpoint by."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import xxhash

from jobs.demo_training.documentation import held_out, standard_library, without_copies
from jobs.demo_training.questions import KINDS, cut, kind_of

QUERIES_PER_KIND = 100


def write_collection(folder: Path) -> None:
    """Write the modules of this Python's standard library that were never trained on.

    Each document is cut by its kind (see questions.py), or stands as a whole where that gives no
    question. The same number of each kind is asked, chosen by hash. What the collection holds
    depends on the version of Python.
    """
    documents = [d for d in standard_library() if held_out(d.source)]
    questions = {d: cut(d, kind_of(d)) for d in without_copies(documents, of=())}
    asked = sorted(
        ((document.name, question) for document, question in questions.items() if question),
        key=lambda pair: xxhash.xxh3_64_intdigest(pair[0].encode(), seed=2),
    )
    chosen = []
    for kind in KINDS:
        chosen += [pair for pair in asked if pair[1].kind == kind][:QUERIES_PER_KIND]
    ids = [f"{question.kind}-{i}" for i, (_, question) in enumerate(chosen)]
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write(
        folder / "corpus.jsonl",
        ((d.name, question.passage if question else d.text) for d, question in questions.items()),
    )
    _write(
        folder / "queries.jsonl",
        ((i, question.query) for i, (_, question) in zip(ids, chosen, strict=True)),
    )
    judgements = [f"{i}\t{name}\t1\n" for i, (name, _) in zip(ids, chosen, strict=True)]
    (folder / "qrels" / "test.tsv").write_text(
        "".join(["query-id\tcorpus-id\tscore\n", *judgements]), encoding="utf-8"
    )


def _write(file: Path, texts: Iterable[tuple[str, str]]) -> None:
    lines = (json.dumps({"_id": i, "text": t}, ensure_ascii=False) + "\n" for i, t in texts)
    file.write_text("".join(lines), encoding="utf-8")
