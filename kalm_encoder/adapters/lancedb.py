"""KaLMReranker ranks the results of LanceDB's vector, full-text and hybrid queries.

    table.search("query", query_type="hybrid").rerank(KaLMReranker("passages.lance")).to_list()

The searched table and the passage table are two tables that share an id column. LanceDB hands every
column of a search result to its reranker, so states in the searched table would be read needlessly.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from lancedb.rerankers import Reranker as LanceDBReranker

from kalm_encoder.errors import InputError
from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.rerank.results import at_places

SCORE = "_relevance_score"


class KaLMReranker(LanceDBReranker):
    """Scores search results by P(yes) from stored states; it sends no text to a model.

    Args:
        reranker: An open Reranker, or the address of a passage table.
        id_column: Column of the searched table that holds the ids of the passage table.
        return_score: "relevance", or "all" to keep `_distance` and `_score` too.
        options: Options of `Reranker.rerank`: instruction, system_instruction, ratio, cascade,
            max_ms.
    """

    def __init__(
        self,
        reranker: Reranker | str,
        *,
        id_column: str = "id",
        return_score: str = "relevance",
        **options: Any,
    ) -> None:
        super().__init__(return_score)
        self._reranker = Reranker.open(reranker) if isinstance(reranker, str) else reranker
        self._id_column = id_column
        self._options = options

    def __str__(self) -> str:
        return f"KaLMReranker({self._reranker.table.uri})"

    def rerank_hybrid(
        self, query: str, vector_results: pa.Table, fts_results: pa.Table
    ) -> pa.Table:
        """Merge both sets of results and rank them."""
        merge = self._merge_and_keep_scores if self.score == "all" else self.merge_results
        return self._rank(query, merge(vector_results, fts_results))

    def rerank_vector(self, query: str, vector_results: pa.Table) -> pa.Table:
        """Rank the results of a vector search."""
        return self._rank(query, vector_results)

    def rerank_fts(self, query: str, fts_results: pa.Table) -> pa.Table:
        """Rank the results of a full-text search."""
        return self._rank(query, fts_results)

    def _rank(self, query: str, rows: pa.Table) -> pa.Table:
        """Return the rows best first, with a float32 column `_relevance_score`.

        Raises:
            InputError: If the results have no id column.
            MissingIdsError: If the passage table does not hold some ids; it names them.
        """
        if self._id_column not in rows.column_names:
            raise InputError(
                f"the search results have no column {self._id_column!r}: select it, or name "
                f"another as id_column (they have {', '.join(rows.column_names)})"
            )
        ids = [str(i) for i in rows[self._id_column].to_pylist()]
        results = self._reranker.rerank(query, ids, **self._options)
        ranked = at_places(results, ids)
        order = pa.array([place for place, _ in ranked], pa.int64())
        scores = pa.array([result.score for _, result in ranked], pa.float32())
        return self._keep_relevance_score(rows.take(order).append_column(SCORE, scores))
