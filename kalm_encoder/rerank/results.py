"""Describes what reranking returns, and finds its place in the list of a caller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Literal

from kalm_encoder.table.ids import Id, as_ids

OnMissing = Literal["error", "drop", "last"]
"""Says what becomes of ids that the table does not hold: an error, nothing, or the last places."""


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One candidate.

    Attributes:
        id: Id of the passage.
        score: P(yes) in [0, 1].
        margin: Logit of `yes` minus logit of `no`.
        ratio: Ratio of the states it was scored from. It is coarser than asked for if a cascade
            dropped the candidate or the time ran out. It is None if the table does not hold the
            passage: then nothing was scored, the score is 0 and the margin is minus infinity.
    """

    id: str
    score: float
    margin: float
    ratio: int | None


@dataclass(frozen=True, slots=True)
class DocumentResult(RerankResult):
    """One document; its score, margin and ratio come from its passages.

    Attributes:
        passage_id: Id of its best passage; None if the table holds none.
        span: First character of that passage in the text of the document, and the one behind its
            last; None if the table was not encoded with --split.
    """

    passage_id: str | None
    span: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class TextResult:
    """One text.

    Attributes:
        text: The text.
        score: P(yes) in [0, 1].
        margin: Logit of `yes` minus logit of `no`.
        ratio: As in `RerankResult`; None if the text is neither stored nor encoded.
        id: Id of the stored passage that it was scored from; None if the table holds none.
    """

    text: str
    score: float
    margin: float
    ratio: int | None
    id: str | None


def passage_of(result: RerankResult) -> str:
    """Return the id of the passage of a result: the best one of a document."""
    if isinstance(result, DocumentResult) and result.passage_id is not None:
        return result.passage_id
    return result.id


def at_places(results: Sequence[RerankResult], ids: Sequence[Id]) -> list[tuple[int, RerankResult]]:
    """Return the results with their places in a list of ids, where an id may occur repeatedly.

    Results with the same score come in the order of their places. A document that is not among the
    ids has the place of its best passage.
    """
    places: dict[str, list[int]] = {}
    for place, id in enumerate(as_ids(ids)):
        places.setdefault(id, []).append(place)
    ranked: list[tuple[int, RerankResult]] = []
    for _, tied in groupby(results, key=lambda r: (r.ratio, r.score, r.margin)):
        found = ((r, r.id if r.id in places else passage_of(r)) for r in tied)
        ranked += sorted(((place, r) for r, id in found for place in places[id]), key=itemgetter(0))
    return ranked


def falling_scores(results: Sequence[RerankResult]) -> list[float]:
    """Return the scores for a framework that sorts by them: none is above the one before it.

    P(yes) at different ratios does not compare. A candidate that only a coarser stage scored gets
    at most the lowest score of the finer one. Without stages these are the scores themselves.

    Example: .8 and .3 at ratio 4, then .5 and .1 at ratio 32, become .8, .3, .3 and .1.
    """
    return list(accumulate((result.score for result in results), min))
