"""What the adapters for frameworks built on pydantic have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from kalm_encoder.rerank.reranker import Reranker, RerankResult


class RerankFields(BaseModel):
    """An open table and the options of `Reranker.rerank`.

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

    def _rank(self, query: str, ids: Sequence[str]) -> list[RerankResult]:
        return self._reranker.rerank(
            query,
            ids,
            instruction=self.instruction,
            ratio=self.ratio,
            cascade=self.cascade,
            max_ms=self.max_ms,
        )
