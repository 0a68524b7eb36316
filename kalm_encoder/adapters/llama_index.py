"""KaLMNodePostprocessor ranks the nodes of a LlamaIndex retriever by stored states.

    postprocessor = KaLMNodePostprocessor(reranker="passages.lance", top_n=5)
    engine = index.as_query_engine(node_postprocessors=[postprocessor])
    postprocessor.postprocess_nodes(nodes, query_str="how are states read?")[0].score  # P(yes)

Retriever and states share only ids, so any retriever of LlamaIndex will do.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from kalm_encoder.adapters.framework_fields import RerankFields
from kalm_encoder.errors import InputError
from kalm_encoder.table.ids import as_id


class KaLMNodePostprocessor(RerankFields, BaseNodePostprocessor):
    """Keeps the best nodes by P(yes); it sends no text to a model.

    The passage id of a node is its metadata `id_key`, or its `node_id` if it has no such key. With
    `match_text` its passage is the one whose text is the content of the node, without metadata. The
    fields that are not listed here are those of RerankFields.

    Attributes:
        keep_retrieval_score: Whether to keep the retriever's score as metadata "retrieval_score",
            as SentenceTransformerRerank does.
    """

    keep_retrieval_score: bool = False

    @classmethod
    def class_name(cls) -> str:
        """Return the name in LlamaIndex's serialised form."""
        return "KaLMNodePostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Return copies of the best nodes, best first, with P(yes) as their score.

        Raises:
            InputError: If there is no query.
            MissingIdsError: If the table does not hold some ids; it names them.
            MissingTextsError: The same with `match_text`.
        """
        if query_bundle is None:
            raise InputError("no query to rank by: give query_bundle or query_str")
        if self.match_text:
            ids = self._keys_of([n.node.get_content(MetadataMode.NONE) for n in nodes])
        else:
            ids = [self._passage_id(n) for n in nodes]
        ranked = self._rank(query_bundle.query_str, ids, nodes)
        return [self._scored(node, score, metadata) for node, score, _, metadata in ranked]

    def _passage_id(self, node: NodeWithScore) -> str:
        given = node.node.metadata.get(self.id_key)
        return as_id(node.node.node_id if given is None else given)

    def _scored(self, node: NodeWithScore, score: float, metadata: dict[str, Any]) -> NodeWithScore:
        inner = node.node
        found = metadata | ({"retrieval_score": node.score} if self.keep_retrieval_score else {})
        if found:
            inner = inner.model_copy(update={"metadata": inner.metadata | found})
        return NodeWithScore(node=inner, score=score)
