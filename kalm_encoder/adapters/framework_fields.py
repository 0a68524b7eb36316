"""Holds what the adapters for LangChain and LlamaIndex share.

It is a module of its own because neither adapter can be imported without its framework.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from kalm_encoder.errors import MissingIdsError
from kalm_encoder.rerank.grouping import MAX_PASSAGES, Aggregate
from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.rerank.results import (
    DocumentResult,
    OnMissing,
    RerankResult,
    at_places,
    falling_scores,
    passage_of,
)
from kalm_encoder.rerank.texts import keys_of, naming_texts

Item = TypeVar("Item")


def _address(given: Any) -> Any:
    return os.fspath(given) if isinstance(given, os.PathLike) else given


class RerankFields(BaseModel):
    """An open table and the options of `Reranker.rerank`.

    Attributes:
        reranker: An open Reranker, or the address of a passage table.
        top_n: Number of items to keep; None keeps all.
        id_key: Metadata key that holds the id of the passage.
        match_text: Whether the passage of an item is the one with its text, instead of an id.
        instruction: Option of `Reranker.rerank`, like the five below.
        system_instruction: What the model is told before the task.
        ratio: Ratio of the states to score.
        cascade: Stages instead of one ratio.
        max_ms: Time budget in milliseconds.
        on_missing: What becomes of items whose id (or text) the table does not hold: error, drop or
            last.
        where: SQL predicate over the columns of the table. Items whose rows do not satisfy it, and
            those without a row, are left out.
        with_metadata: Whether items get the metadata columns of the table as metadata, in place of
            what they have under the same names.
        group_by: Metadata column of the table that names the document of a passage. Then of each
            document one item is kept, which gets `passage_id`, `document_id` and `span` as
            metadata. The ids of items may be those of passages or of documents.
        aggregate: What gives the score of a document: "max" or "mean_top_2".
        max_passages: Most passages of a document that are scored at the ratio asked for.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: Annotated[Reranker | str, BeforeValidator(_address)]
    top_n: int | None = Field(default=None, ge=1)
    id_key: str = "id"
    match_text: bool = False
    instruction: str | None = None
    system_instruction: str | None = None
    ratio: int | None = None
    cascade: Sequence[tuple[int, int | None]] | None = None
    max_ms: float | None = None
    on_missing: OnMissing = "error"
    where: str | None = None
    with_metadata: bool = False
    group_by: str | None = None
    aggregate: Aggregate = "max"
    max_passages: int = Field(default=MAX_PASSAGES, ge=1)
    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the table if an address was given, and refuse options that it cannot satisfy."""
        self._reranker = Reranker.of(self.reranker, match_text=self.match_text)
        self._reranker.stages(ratio=self.ratio, cascade=self.cascade, max_ms=self.max_ms)
        if self.where is not None:
            self._reranker.table.check_filter(self.where)
        if self.group_by is not None:
            self._reranker.table.members([], self.group_by)

    def _keys_of(self, texts: Sequence[str]) -> list[str]:
        """Return for each text the id of the passage that has it, or a key that no passage has."""
        keys = keys_of(texts, self._reranker.table.ids_by_text(texts))
        return [keys[text] for text in texts]

    def _rank(
        self, query: str, ids: Sequence[str], items: Sequence[Item]
    ) -> list[tuple[Item, float, int | None, dict[str, Any]]]:
        """Return the best items with score, ratio and metadata, best first.

        Equal ids have one score. The metadata are empty unless `with_metadata` or `group_by` asks
        for them.

        The score is P(yes), and never above that of the item before; see `falling_scores`.
        """
        try:
            with naming_texts(self._reranker.table.uri):
                results = self._reranker.rerank(
                    query,
                    ids,
                    instruction=self.instruction,
                    system_instruction=self.system_instruction,
                    ratio=self.ratio,
                    cascade=self.cascade,
                    max_ms=self.max_ms,
                    on_missing=self.on_missing,
                    where=self.where,
                    group_by=self.group_by,
                    aggregate=self.aggregate,
                    max_passages=self.max_passages,
                )
        except MissingIdsError as error:
            remedy = f"name the metadata key that holds them as id_key (now {self.id_key!r}), or "
            raise MissingIdsError(error.ids, error.uri, remedy + error.remedy) from None
        ranked = at_places(results, ids)[: self.top_n]
        found = [result for _, result in ranked]
        metadata = {}
        if self.with_metadata:
            metadata = self._reranker.table.metadata([passage_of(result) for result in found])
        scores = zip(ranked, falling_scores(found), strict=True)
        return [
            (items[p], s, r.ratio, metadata.get(passage_of(r), {}) | _of_document(r))
            for (p, r), s in scores
        ]


def _of_document(result: RerankResult) -> dict[str, Any]:
    """Return what an item of a document is told of its best passage."""
    if not isinstance(result, DocumentResult):
        return {}
    return {"document_id": result.id, "passage_id": result.passage_id, "span": result.span}
