"""KaLMNodePostprocessor: ranks the nodes of a LlamaIndex retriever by stored states.

    postprocessor = KaLMNodePostprocessor(reranker="passages.lance", top_n=5)
    engine = index.as_query_engine(node_postprocessors=[postprocessor])
    postprocessor.postprocess_nodes(nodes, query_str="how are states read?")[0].score  # P(yes)

Retriever and states share only ids: the retriever may be any of LlamaIndex's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle
from pydantic import ConfigDict, Field, PrivateAttr

from kalm_encoder.errors import InputError
from kalm_encoder.rerank import Reranker


class KaLMNodePostprocessor(BaseNodePostprocessor):
    """Keeps the best nodes by P(yes); no text is sent to a model.

    A node's passage is its metadata `id_key`; where it has none, its `node_id`.

    Attributes:
        reranker: an open Reranker, or the address of a passage table.
        top_n: keep the best n; None keeps all.
        id_key: metadata key that holds the id of the passage table.
        keep_retrieval_score: whether to keep the retriever's score as metadata "retrieval_score",
            as SentenceTransformerRerank does.
        instruction: as in `Reranker.rerank`, like the three below.
        ratio: of the states to score.
        cascade: stages instead of one ratio.
        max_ms: time budget.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: Reranker | str
    top_n: int | None = Field(default=None, ge=1)
    id_key: str = "id"
    keep_retrieval_score: bool = False
    instruction: str | None = None
    ratio: int | None = None
    cascade: Sequence[tuple[int, int | None]] | None = None
    max_ms: float | None = None
    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the table where an address was given."""
        given = self.reranker
        self._reranker = Reranker.open(given) if isinstance(given, str) else given

    @classmethod
    def class_name(cls) -> str:
        """Name in LlamaIndex's serialised form."""
        return "KaLMNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return the best nodes, best first, with P(yes) as their score; the given stay as is.

        Raises:
            InputError: no query.
            MissingIdsError: names ids without stored states.
        """
        if query_bundle is None:
            raise InputError("no query to rank by: give query_bundle or query_str")
        by_id: dict[str, list[NodeWithScore]] = {}
        for node in nodes:
            given = node.node.metadata.get(self.id_key)
            passage_id = node.node.node_id if given is None else str(given)
            by_id.setdefault(passage_id, []).append(node)
        results = self._reranker.rerank(
            query_bundle.query_str,
            list(by_id),
            instruction=self.instruction,
            ratio=self.ratio,
            cascade=self.cascade,
            max_ms=self.max_ms,
        )
        ranked = [(node, r.score) for r in results for node in by_id[r.id]]
        return [self._scored(node, score) for node, score in ranked[: self.top_n]]

    def _scored(self, node: NodeWithScore, score: float) -> NodeWithScore:
        inner = node.node
        if self.keep_retrieval_score:
            metadata = {**inner.metadata, "retrieval_score": node.score}
            inner = inner.model_copy(update={"metadata": metadata})
        return NodeWithScore(node=inner, score=score)
