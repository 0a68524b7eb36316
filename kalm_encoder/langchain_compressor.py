"""KaLMCompressor: ranks the documents of a LangChain retriever by stored states.

    compressor = KaLMCompressor(reranker="passages.lance", top_n=5)
    best = compressor.compress_documents(retriever.invoke(query), query)
    best[0].metadata["relevance_score"]  # P(yes)

Retriever and states share only ids: the retriever may be any of LangChain's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, Field, PrivateAttr

from kalm_encoder.errors import InputError
from kalm_encoder.rerank import Reranker

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks


class KaLMCompressor(BaseDocumentCompressor):
    """Keeps the best documents by P(yes); no text is sent to a model.

    A document's passage is its metadata `id_key`; where it has none, its `id`.

    Attributes:
        reranker: an open Reranker, or the address of a passage table.
        top_n: keep the best n; None keeps all.
        id_key: metadata key that holds the id of the passage table.
        instruction: as in `Reranker.rerank`, like the three below.
        ratio: of the states to score.
        cascade: stages instead of one ratio.
        max_ms: time budget.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: Reranker | str
    top_n: int | None = Field(default=None, ge=1)
    id_key: str = "id"
    instruction: str | None = None
    ratio: int | None = None
    cascade: Sequence[tuple[int, int | None]] | None = None
    max_ms: float | None = None
    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the table where an address was given."""
        given = self.reranker
        self._reranker = Reranker.open(given) if isinstance(given, str) else given

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents, best first, with metadata `relevance_score`.

        Raises:
            InputError: a document without id.
            MissingIdsError: names ids without stored states.
        """
        by_id: dict[str, list[Document]] = {}
        for position, document in enumerate(documents):
            by_id.setdefault(self._passage_id(position, document), []).append(document)
        results = self._reranker.rerank(
            query,
            list(by_id),
            instruction=self.instruction,
            ratio=self.ratio,
            cascade=self.cascade,
            max_ms=self.max_ms,
        )
        ranked = [(document, r.score) for r in results for document in by_id[r.id]]
        return [
            document.model_copy(
                update={"metadata": {**document.metadata, "relevance_score": score}}
            )
            for document, score in ranked[: self.top_n]
        ]

    def _passage_id(self, position: int, document: Document) -> str:
        given = document.metadata.get(self.id_key)
        found = document.id if given is None else given
        if found is None:
            raise InputError(
                f"document {position} ({document.page_content[:40]!r}) has no metadata "
                f"{self.id_key!r} and no id: name the key that holds it as id_key"
            )
        return str(found)
