"""KaLMCrossEncoder answers the calls of sentence-transformers' CrossEncoder from stored states.

    model = KaLMCrossEncoder("passages.lance")
    model.rank("how are states read?", ["d1", "d2", "d3"], top_k=2)  # [{"corpus_id": 1, "score": …
    model.predict([("how are states read?", "d1"), ("another query", "d7")])

Documents are ids of the table. With an encoder they are texts, which are encoded in each call. This
module does not import sentence-transformers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kalm_encoder.errors import MismatchError
from kalm_encoder.matryoshka import PassageStates
from kalm_encoder.rerank.reranker import Reranker

if TYPE_CHECKING:
    from kalm_encoder.model.encoder import PassageEncoder


class KaLMCrossEncoder:
    """Scores (query, document) pairs by P(yes). The score of a pair depends on no other pair.

    Args:
        reranker: An open Reranker, or the address of a passage table.
        encoder: Encoder of the table's model; with one, documents are texts. Their states are
            float32, so their scores are not rounded to the table's store_dtype.
        instruction: Description of the task; None takes the model's default.
        system_instruction: What the model is told before the task; None takes its default.
        ratio: Any multiple of a stored ratio; None takes the finest stored.

    Raises:
        MismatchError: If the encoder has another passage length than the table.
        InputError: If the ratio is impossible.
    """

    def __init__(
        self,
        reranker: Reranker | str,
        *,
        encoder: PassageEncoder | None = None,
        instruction: str | None = None,
        system_instruction: str | None = None,
        ratio: int | None = None,
    ) -> None:
        self._reranker = Reranker.open(reranker) if isinstance(reranker, str) else reranker
        spec = self._reranker.table.spec
        spec.source_ratio(ratio)
        if encoder is not None and encoder.max_length != spec.max_length:
            raise MismatchError(
                "max_length",
                f"{self._reranker.table.uri} has max_length {spec.max_length}, the encoder "
                f"{encoder.max_length}: load it with PassageEncoder({spec.model!r}, "
                f"max_length={spec.max_length})",
            )
        self._encoder = encoder
        self._options: dict[str, Any] = {
            "instruction": instruction,
            "system_instruction": system_instruction,
            "ratio": ratio,
        }

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool | None = None,
        convert_to_tensor: bool | None = None,
    ) -> list[dict[str, Any]]:
        """Rank documents for a query.

        Args:
            query: Raw text.
            documents: Ids, or texts if there is an encoder. A repeated one is in the result twice.
            top_k: Number of results to keep; None keeps all.
            return_documents: Whether to add each given document to its result as "text".
            batch_size: Ignored, because batches have a token budget.
            show_progress_bar: Ignored.
            convert_to_numpy: Ignored, because scores are Python floats.
            convert_to_tensor: Ignored for the same reason.

        Returns:
            {"corpus_id": position, "score": P(yes)} per document, best first; ties are broken by
            margin and then by position.
        """
        scores = self._scores([(query, document) for document in documents])
        order = sorted(range(len(documents)), key=scores.__getitem__, reverse=True)[:top_k]
        ranked: list[dict[str, Any]] = [{"corpus_id": i, "score": scores[i][0]} for i in order]
        if return_documents:
            for row in ranked:
                row["text"] = documents[row["corpus_id"]]
        return ranked

    def predict(
        self,
        inputs: Sequence[Sequence[str]] | Sequence[str],
        *,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
    ) -> Any:
        """Score pairs.

        Args:
            inputs: n (query, document) pairs, or a single one; documents as in `rank`.
            batch_size: Ignored, because batches have a token budget.
            show_progress_bar: Ignored.
            convert_to_numpy: Whether to return an array; False returns a list of scalar tensors.
            convert_to_tensor: Whether to return one tensor. It overrides `convert_to_numpy`.

        Returns:
            P(yes), (n,) float32 in input order; a scalar for a single pair.
        """
        single = len(inputs) > 0 and isinstance(inputs[0], str)
        pairs: Any = [inputs] if single else inputs
        scores = np.array([score for score, _ in self._scores(pairs)], dtype=np.float32)
        result: Any = scores if convert_to_numpy else list(torch.from_numpy(scores))
        if convert_to_tensor:
            result = torch.from_numpy(scores)
        return result[0] if single else result

    def _scores(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, float]]:
        """Return (score, margin) per pair. Each query and each repeated document is scored once."""
        documents = defaultdict(list)
        for query, document in pairs:
            documents[query].append(document)
        passages: dict[str, PassageStates] = {}
        if self._encoder is not None:
            texts = list(dict.fromkeys(document for _, document in pairs))
            encoded = self._encoder.encode(texts, ratio=self._reranker.table.spec.ratios[0])
            passages = dict(zip(texts, encoded, strict=True))
        found = {}
        for query, wanted in documents.items():
            results = self._reranker.rerank(query, wanted, passages=passages, **self._options)
            for r in results:
                found[query, r.id] = r.score, r.margin
        return [found[query, document] for query, document in pairs]
