"""Ranks documents by the scores of their passages, at a cost that their length does not raise.

A candidate is a document, which stands for all of its passages, or a passage. Of a document with
many candidate passages only the best at the coarse ratio are scored as was asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.rerank.cascade import Stage, coarse_ratio
from kalm_encoder.rerank.results import DocumentResult, OnMissing, RerankResult
from kalm_encoder.table.ids import Id, as_ids
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.table_version import Member

Aggregate = Literal["max", "mean_top_2"]
"""The score of a document: that of its best passage, or the mean of its best two."""
MAX_PASSAGES = 8
"""Passages per document that are scored at the ratio that was asked for, unless told otherwise."""

RankPassages = Callable[..., list[RerankResult]]
"""Ranks passages by id; takes those options of `Reranker.rerank` that are given here."""


@dataclass(frozen=True)
class Grouping:
    """How passages become documents.

    Attributes:
        column: Metadata column that names the document of a passage.
        aggregate: How its passages give the score of a document.
        max_passages: Most passages of a document that are scored at the ratio that was asked for.

    Raises:
        InputError: If aggregate or max_passages is impossible.
    """

    column: str
    aggregate: Aggregate = "max"
    max_passages: int = MAX_PASSAGES

    def __post_init__(self) -> None:
        if self.aggregate not in get_args(Aggregate):
            raise InputError(f"aggregate {self.aggregate!r} must be max or mean_top_2")
        if self.max_passages < 1:
            raise InputError(f"max_passages {self.max_passages} must be at least 1")


def rank_documents(
    rank: RankPassages,
    table: PassageTable,
    ids: Sequence[Id],
    grouping: Grouping,
    *,
    stages: Sequence[Stage],
    max_ms: float | None,
    on_missing: OnMissing,
) -> list[DocumentResult]:
    """Return one result per document, in the order of `Reranker.rerank`.

    Args:
        rank: Ranks passages.
        table: The open table.
        ids: Documents, passages, or both. A document that is not named itself has the passages that
            are.
        grouping: How passages become documents.
        stages: Stages of the request.
        max_ms: Time budget in milliseconds; choosing passages takes part of it.
        on_missing: What becomes of ids that are neither a document nor a passage.

    Raises:
        MissingIdsError: If the table does not hold some ids; it names all of them.
        InputError: If the table has no such column of strings.
    """
    began = time.monotonic()
    places = {id: place for place, id in reversed(list(enumerate(as_ids(ids))))}
    members = {m.id: m for m in table.members(list(places), grouping.column)}
    missing = places.keys() - members.keys() - {m.document for m in members.values()}
    if missing and on_missing == "error":
        remedy = "leave them out with on_missing='drop', or rank them last with on_missing='last'"
        raise MissingIdsError(sorted(missing, key=places.__getitem__), table.uri, remedy)
    chosen, long = _by_length(members.values(), grouping.max_passages)
    if long:
        ratio = max(coarse_ratio(table.spec), stages[0][0])
        best = _by_document(rank(long, ratio=ratio, on_missing="drop"), members)
        chosen += [r.id for found in best.values() for r in found[: grouping.max_passages]]
    if max_ms is not None:
        max_ms = max(1.0, max_ms - 1000 * (time.monotonic() - began))
    scored = _by_document(rank(chosen, cascade=stages, max_ms=max_ms, on_missing="drop"), members)
    order = {name: min(_places(found, members, places)) for name, found in scored.items()}
    results = [_document(name, found, grouping, members) for name, found in scored.items()]
    results.sort(key=lambda r: (r.ratio, -r.score, -r.margin, order[r.id]))
    if on_missing == "last":
        last = sorted(missing, key=places.__getitem__)
        results += [DocumentResult(id, 0.0, -math.inf, None, None, None) for id in last]
    return results


def _by_length(members: Iterable[Member], max_passages: int) -> tuple[list[str], list[str]]:
    """Return the passages of the documents that have at most so many, and those of the others."""
    documents: dict[str, list[str]] = {}
    for member in members:
        documents.setdefault(member.document, []).append(member.id)
    short = [i for found in documents.values() if len(found) <= max_passages for i in found]
    return short, [i for found in documents.values() if len(found) > max_passages for i in found]


def _by_document(
    results: Sequence[RerankResult], members: Mapping[str, Member]
) -> dict[str, list[RerankResult]]:
    """Return the results of each document, best first."""
    documents: dict[str, list[RerankResult]] = {}
    for result in results:
        documents.setdefault(members[result.id].document, []).append(result)
    return documents


def _places(
    found: Sequence[RerankResult], members: Mapping[str, Member], places: Mapping[str, int]
) -> Iterable[int]:
    """Return the places of a document and of its passages in the list of candidates."""
    names = {members[found[0].id].document, *(result.id for result in found)}
    return (places[name] for name in names if name in places)


def _document(
    name: str,
    found: Sequence[RerankResult],
    grouping: Grouping,
    members: Mapping[str, Member],
) -> DocumentResult:
    """Return the result of a document; only the scores of its finest ratio count."""
    best = found[0]
    count = 1 if grouping.aggregate == "max" else 2
    counted = [result for result in found if result.ratio == best.ratio][:count]
    score = sum(result.score for result in counted) / len(counted)
    margin = sum(result.margin for result in counted) / len(counted)
    return DocumentResult(name, score, margin, best.ratio, best.id, members[best.id].span)
