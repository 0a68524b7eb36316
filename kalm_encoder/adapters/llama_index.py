"""KaLMNodePostprocessor: ranks the nodes of a LlamaIndex retriever by stored states.

    postprocessor = KaLMNodePostprocessor(reranker="passages.lance", top_n=5)
    engine = index.as_query_engine(node_postprocessors=[postprocessor])
    postprocessor.postprocess_nodes(nodes, query_str="how are states read?")[0].score  # P(yes)

Retriever and states share only ids: the retriever may be any of LlamaIndex's.
"""

from __future__ import annotations

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle

from kalm_encoder.adapters.framework_fields import RerankFields
from kalm_encoder.errors import InputError


class KaLMNodePostprocessor(RerankFields, BaseNodePostprocessor):
    """Keeps the best nodes by P(yes); no text is sent to a model.

    A node's passage is its metadata `id_key`; where it has none, its `node_id`.

    Attributes:
        keep_retrieval_score: whether to keep the retriever's score as metadata "retrieval_score",
            as SentenceTransformerRerank does. The other fields are those of RerankFields.
    """

    keep_retrieval_score: bool = False

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
        results = self._rank(query_bundle.query_str, list(by_id))
        ranked = [(node, r.score) for r in results for node in by_id[r.id]]
        return [self._scored(node, score) for node, score in ranked[: self.top_n]]

    def _scored(self, node: NodeWithScore, score: float) -> NodeWithScore:
        inner = node.node
        if self.keep_retrieval_score:
            metadata = {**inner.metadata, "retrieval_score": node.score}
            inner = inner.model_copy(update={"metadata": metadata})
        return NodeWithScore(node=inner, score=score)
