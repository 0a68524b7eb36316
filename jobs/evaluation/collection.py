"""Queries and judgements: a folder in BEIR's layout, or files in BEIR's or TREC's formats.

corpus.jsonl    {"_id", "title", "text"}, or what `kalm encode` reads
queries.jsonl   {"_id", "text"}; or TSV: id <TAB> text
qrels/test.tsv  query-id <TAB> corpus-id <TAB> score, with header; or TREC: qid 0 docid relevance
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kalm_encoder.errors import InputError
from kalm_encoder.table.ids import as_id

CORPUS_NAMES = ("corpus.jsonl", "corpus.jsonl.gz", "corpus.jsonl.zst", "corpus.parquet")


@dataclass(frozen=True)
class Collection:
    """Queries with judgements, and where the passages are.

    Attributes:
        name: Last part of the folder, or name of the file of judgements.
        split: Split of the judgements.
        corpus: Input files of the passages.
        queries: Text by id of the queries with at least one relevant passage, in the order of their
            file.
        judgements: Relevance by query id and passage id; above 0 is relevant.
        warnings: What was left out.
    """

    name: str
    split: str
    corpus: tuple[str, ...]
    queries: dict[str, str]
    judgements: dict[str, dict[str, int]]
    warnings: tuple[str, ...] = field(default=())


def read_folder(folder: Path, split: str = "test") -> Collection:
    """Read a BEIR folder.

    Raises:
        InputError: A file is missing or has a bad line; the message names the file and the line.
    """
    corpus = [folder / name for name in CORPUS_NAMES if (folder / name).exists()]
    judgements = folder / "qrels" / f"{split}.tsv"
    if not corpus:
        raise InputError(f"{folder} holds no corpus.jsonl: not a collection in BEIR's layout")
    if not judgements.exists():
        found = sorted(f.stem for f in (folder / "qrels").glob("*.tsv"))
        raise InputError(
            f"{folder} has no judgements qrels/{split}.tsv; splits there: "
            f"{', '.join(found) or 'none'}"
        )
    name = folder.resolve().name
    return read_files((str(corpus[0]),), folder / "queries.jsonl", judgements, name, split)


def read_files(
    corpus: tuple[str, ...], queries: Path, judgements: Path, name: str, split: str
) -> Collection:
    """Read queries and judgements from files of their own.

    Raises:
        InputError: A file is missing or has a bad line, or no query has a relevant passage.
    """
    texts = dict(_queries(queries))
    judged: dict[str, dict[str, int]] = {}
    for query, passage, relevance in _judgements(judgements):
        judged.setdefault(query, {})[passage] = relevance
    useful = {q for q, passages in judged.items() if max(passages.values()) > 0}
    kept = {q: text for q, text in texts.items() if q in useful}
    if not kept:
        raise InputError(
            f"no query of {queries} has a relevant passage in {judgements}: do their ids belong "
            "together?"
        )
    warnings = []
    if unjudged := len(texts) - len(kept):
        warnings.append(f"{unjudged} queries without a relevant passage were left out")
    if unknown := useful - set(texts):
        shown = ", ".join(sorted(unknown)[:5])
        warnings.append(f"{len(unknown)} judged queries have no text and were left out: {shown}")
    return Collection(name, split, corpus, kept, {q: judged[q] for q in kept}, tuple(warnings))


def _queries(file: Path) -> Iterator[tuple[str, str]]:
    for number, line in _lines(file):
        if file.suffix == ".tsv":
            query, tab, text = line.partition("\t")
            if not tab:
                raise InputError(f"{file} line {number}: expected id<TAB>text")
            yield query, text
            continue
        try:
            row = json.loads(line)
            query, text = as_id(row["_id"]), row["text"]
            if not isinstance(text, str):
                raise TypeError(f"the text is {text!r}")
            yield query, text
        except (InputError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{file} line {number}: expected {{"_id": …, "text": …}} ({error})'
            ) from None


def _judgements(file: Path) -> Iterator[tuple[str, str, int]]:
    for number, line in _lines(file):
        fields = line.split("\t") if "\t" in line else line.split()
        if number == 1 and fields[-1] == "score":
            continue  # BEIR's header
        if len(fields) == 4:  # TREC: the second field is never used
            fields = [fields[0], *fields[2:]]
        try:
            query, passage, relevance = fields
            yield query, passage, int(relevance)
        except ValueError:
            raise InputError(
                f"{file} line {number}: expected query-id, corpus-id and score, or the four fields "
                "of TREC's judgements"
            ) from None


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    try:
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line.rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
