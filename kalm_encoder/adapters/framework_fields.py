"""Holds what the adapters for LangChain and LlamaIndex share.

It is a module of its own because neither adapter can be imported without its framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from kalm_encoder.rerank.reranker import Reranker
from kalm_encoder.rerank.results import at_places

Item = TypeVar("Item")


class RerankFields(BaseModel):
    """An open table and the options of `Reranker.rerank`.

    Attributes:
        reranker: An open Reranker, or the address of a passage table.
        top_n: Number of items to keep; None keeps all.
        id_key: Metadata key that holds the id of the passage.
        instruction: Option of `Reranker.rerank`, like the four below.
        system_instruction: What the model is told before the task.
        ratio: Ratio of the states to score.
        cascade: Stages instead of one ratio.
        max_ms: Time budget in milliseconds.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    reranker: Reranker | str
    top_n: int | None = Field(default=None, ge=1)
    id_key: str = "id"
    instruction: str | None = None
    system_instruction: str | None = None
    ratio: int | None = None
    cascade: Sequence[tuple[int, int | None]] | None = None
    max_ms: float | None = None
    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        """Open the table if an address was given."""
        given = self.reranker
        self._reranker = Reranker.open(given) if isinstance(given, str) else given

    def _rank(
        self, query: str, ids: Sequence[str], items: Sequence[Item]
    ) -> list[tuple[Item, float]]:
        """Return the best items with P(yes), best first; items with the same id have one score."""
        results = self._reranker.rerank(
            query,
            ids,
            instruction=self.instruction,
            system_instruction=self.system_instruction,
            ratio=self.ratio,
            cascade=self.cascade,
            max_ms=self.max_ms,
        )
        return [(items[place], r.score) for place, r in at_places(results, ids)][: self.top_n]
