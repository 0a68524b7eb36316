"""KaLMCompressor ranks the documents of a LangChain retriever by stored states.

    compressor = KaLMCompressor(reranker="passages.lance", top_n=5)
    best = compressor.compress_documents(retriever.invoke(query), query)
    best[0].metadata["relevance_score"]  # P(yes)

Retriever and states share only ids, so any retriever of LangChain will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from langchain_core.documents import BaseDocumentCompressor, Document

from kalm_encoder.adapters.framework_fields import RerankFields
from kalm_encoder.errors import InputError
from kalm_encoder.table.ids import as_id

if TYPE_CHECKING:
    from langchain_core.callbacks import Callbacks


class KaLMCompressor(RerankFields, BaseDocumentCompressor):
    """Keeps the best documents by P(yes); it sends no text to a model.

    The passage id of a document is its metadata `id_key`, or its `id` if it has no such key. With
    `match_text` its passage is the one whose text is its `page_content`. The other fields are those
    of RerankFields.
    """

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return copies of the best documents, best first, with metadata `relevance_score`.

        With a cascade or a time budget, `relevance_ratio` says what each was scored from.

        Raises:
            InputError: If a document has no id.
            MissingIdsError: If the table does not hold some ids; it names them.
            MissingTextsError: The same with `match_text`.
        """
        if self.match_text:
            ids = self._keys_of([document.page_content for document in documents])
        else:
            ids = [self._passage_id(*numbered) for numbered in enumerate(documents)]
        staged = self.cascade is not None or self.max_ms is not None
        best = []
        for document, score, ratio, metadata in self._rank(query, ids, documents):
            found = metadata | {"relevance_score": score}
            found |= {"relevance_ratio": ratio} if staged else {}
            best.append(document.model_copy(update={"metadata": document.metadata | found}))
        return best

    def _passage_id(self, position: int, document: Document) -> str:
        given = document.metadata.get(self.id_key)
        found = document.id if given is None else given
        if found is None:
            raise InputError(
                f"document {position} ({document.page_content[:40]!r}) has no metadata "
                f"{self.id_key!r} and no id: name the key that holds it as id_key"
            )
        return as_id(found)
