"""Encoding as work for workers: what travels to each of them. It imports torch only there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.erased import NONE_ERASED, ErasedIds
from pipeline.messages import Place, Work

if TYPE_CHECKING:
    from pipeline.workers.shard_encoder import ShardEncoder


@dataclass(frozen=True, kw_only=True)
class EncodeWork(Work):
    """Shards of a corpus to encode into fragments of the table.

    Attributes:
        spec: Spec of the table. Its fingerprint must be that of the model that a worker finds.
        token_budget: Number of tokens per forward pass. None chooses it from the device and its
            free memory.
        erased: Ids that may not come back to the table.
    """

    spec: TableSpec
    token_budget: int | None = None
    erased: ErasedIds = NONE_ERASED
    loads_model: ClassVar[bool] = True

    def start(self, place: Place) -> ShardEncoder:
        """Load the model and open the table.

        Raises:
            MismatchError: If the model on this machine is not that of the table.
        """
        from pipeline.workers.shard_encoder import ShardEncoder  # noqa: PLC0415

        return ShardEncoder(
            self.table,
            self.spec,
            place,
            token_budget=self.token_budget,
            erased=self.erased,
        )
