"""KaLMReranker ranks the results of LanceDB's vector, full-text and hybrid queries.

    table.search("query", query_type="hybrid").rerank(KaLMReranker("passages.lance")).to_list()

The searched table and the passage table are two tables that share an id column. LanceDB hands every
column of a search result to its reranker, so states in the searched table would be read needlessly.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from lancedb.query import BooleanQuery, BoostQuery, FullTextQuery, Occur
from lancedb.rerankers import Reranker as LanceDBReranker

from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.rerank.cascade import Stage
from kalm_encoder.rerank.grouping import MAX_PASSAGES, Aggregate, Grouping
from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.rerank.results import OnMissing, at_places, falling_scores

SCORE = "_relevance_score"
RATIO = "_relevance_ratio"


class KaLMReranker(LanceDBReranker):
    """Scores search results by P(yes) from stored states; it sends no text to a model.

    Args:
        reranker: An open Reranker, or the address of a passage table.
        id_column: Column of the searched table that holds the ids of the passage table.
        return_score: "relevance", or "all" to keep `_distance` and `_score` too.
        instruction: Option of `Reranker.rerank`, like those below.
        system_instruction: What the model is told before the task.
        ratio: Ratio of the states to score.
        cascade: Stages instead of one ratio.
        max_ms: Time budget in milliseconds.
        on_missing: What becomes of results whose id the passage table does not hold: "error",
            "drop" or "last".
        where: SQL predicate over the columns of the passage table. Results whose rows there do not
            satisfy it, and those without a row, are left out.
        group_by: Metadata column of the passage table that names the document of a passage. Then
            one result per document is kept, that of its best passage.
        aggregate: What gives the score of a document: "max" or "mean_top_2".
        max_passages: Most passages of a document that are scored at the ratio asked for.

    Raises:
        InputError: If an option is impossible.
    """

    def __init__(
        self,
        reranker: Reranker | str | os.PathLike[str],
        *,
        id_column: str = "id",
        return_score: str = "relevance",
        instruction: str | None = None,
        system_instruction: str | None = None,
        ratio: int | None = None,
        cascade: Sequence[Stage] | None = None,
        max_ms: float | None = None,
        on_missing: OnMissing = "error",
        where: str | None = None,
        group_by: str | None = None,
        aggregate: Aggregate = "max",
        max_passages: int = MAX_PASSAGES,
    ) -> None:
        super().__init__(return_score)
        self._reranker = Reranker.of(reranker)
        self._id_column = id_column
        staging: dict[str, Any] = {
            "ratio": ratio,
            "cascade": cascade,
            "max_ms": max_ms,
            "on_missing": on_missing,
        }
        self._is_staged = len(self._reranker.stages(**staging)) > 1
        if where is not None:
            self._reranker.table.check_filter(where)
        if group_by is not None:
            Grouping(group_by, aggregate, max_passages)
            self._reranker.table.members([], group_by)
        self._options = staging | {
            "where": where,
            "group_by": group_by,
            "aggregate": aggregate,
            "max_passages": max_passages,
            "instruction": instruction,
            "system_instruction": system_instruction,
        }

    def __str__(self) -> str:
        return f"KaLMReranker({self._reranker.table.uri})"

    def rerank_hybrid(
        self, query: str | FullTextQuery, vector_results: pa.Table, fts_results: pa.Table
    ) -> pa.Table:
        """Merge both sets of results and rank them."""
        merge = self._merge_and_keep_scores if self.score == "all" else self.merge_results
        return self._rank(query, merge(vector_results, fts_results))

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """Rank the results of a vector search."""
        return self._rank(query, vector_results)

    def rerank_fts(self, query: str | FullTextQuery, fts_results: pa.Table) -> pa.Table:
        """Rank the results of a full-text search."""
        return self._rank(query, fts_results)

    def _rank(self, query: str | FullTextQuery | None, rows: pa.Table) -> pa.Table:
        """Return the rows best first, with a float32 column `_relevance_score` that never rises.

        With a cascade or a time budget, an int32 column `_relevance_ratio` says what each row was
        scored from; see `falling_scores`.

        Raises:
            InputError: If the results have no id column, or the query has no text.
            MissingIdsError: If the passage table does not hold some ids; it names them.
        """
        if self._id_column not in rows.column_names:
            raise InputError(
                f"the search results have no column {self._id_column!r}: select it, or name "
                f"another as id_column (they have {', '.join(rows.column_names)})"
            )
        ids = rows[self._id_column].to_pylist()
        try:
            results = self._reranker.rerank(query_text(query), ids, **self._options)
        except MissingIdsError as error:
            remedy = f"name the column that holds them as id_column (now {self._id_column!r}), or "
            raise MissingIdsError(error.ids, error.uri, remedy + error.remedy) from None
        ranked = at_places(results, ids)
        found = [result for _, result in ranked]
        rows = rows.take(pa.array([place for place, _ in ranked], pa.int64()))
        rows = rows.append_column(SCORE, pa.array(falling_scores(found), pa.float32()))
        if self._is_staged:
            rows = rows.append_column(RATIO, pa.array([r.ratio for r in found], pa.int32()))
        return self._keep_relevance_score(rows)


def query_text(query: str | FullTextQuery | None) -> str:
    """Return the text that a query looks for: what it must not or should rather not find is left.

    Raises:
        InputError: There is no text.
    """
    match query:
        case BoostQuery():
            return query_text(query.positive)
        case BooleanQuery():
            parts = [query_text(part) for occur, part in query.queries if occur != Occur.MUST_NOT]
            return " ".join(dict.fromkeys(parts))
        case FullTextQuery():
            return str(query.query)  # type: ignore[attr-defined]  # of a match, in any columns
        case str():
            return query
    raise InputError(
        f"the query {query!r} has no text to rank by: give it as rerank(reranker, query_string=…)"
    )
