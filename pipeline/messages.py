"""Defines the values that driver and executors exchange: what a worker gets and gives back."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from kalm_encoder.table.location import Location
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.erased import ErasedIds
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import Shard
from pipeline.logs import LogOptions

IN_FLIGHT = 3
"""Least shards per worker at once: one is read or tokenised, one is on the device, one is written.
A CPU worker has no more, because its forwards take nearly all of its time."""


def shards_in_flight(cpus: int, *, on_gpu: bool) -> int:
    """Return how many shards a worker has at once.

    A GPU encodes a shard in a fraction of the time that it takes to read, tokenise and write it, so
    each CPU beside it has a shard of its own.
    """
    return max(IN_FLIGHT, cpus) if on_gpu else IN_FLIGHT


@dataclass(frozen=True)
class WorkerConfig:
    """The settings that every worker needs to encode any shard of a job.

    Attributes:
        table: Address of the table. Its storage options serve for the inputs too; they are passed
            in memory and never written.
        spec: Spec of the table. Its fingerprint must be that of the model this worker finds.
        token_budget: Number of tokens per forward pass. None chooses it from the device and its
            free memory.
        erased: Ids that may not come back to the table.
        threads: Number of CPU threads of the model. None leaves torch's own choice.
        gpu_share: Share of a GPU's memory that this worker may use.
        logs: How a worker logs, and the id of the run.
    """

    table: Location
    spec: TableSpec
    token_budget: int | None = None
    threads: int | None = None
    erased: ErasedIds = field(default_factory=ErasedIds)
    gpu_share: float = 1.0
    logs: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True)
class ShardResult:
    """A shard that was written but not committed.

    Attributes:
        shard: The shard.
        fragment: Lance fragment metadata as JSON; None if every row was rejected.
        num_rows: Number of rows written.
        rejects: Rows that were not written.
        num_tokens: Number of real tokens encoded.
        padded_tokens: Number of tokens the encoder computed, padding included.
        num_truncated: Number of passages cut to max_length.
        seconds: Seconds by stage. read, tokenise, queued (the wait for a busy device), forward,
            pool and write add up to the time of the shard; idle is the time for which the device
            waited for this shard.
        worker: Host and process that encoded it; "" if nobody did.
        compute_dtype: Dtype in which the encoder computed; None if nothing was computed.
    """

    shard: Shard
    fragment: str | None
    num_rows: int
    rejects: tuple[Reject, ...] = ()
    num_tokens: int = 0
    padded_tokens: int = 0
    num_truncated: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    compute_dtype: str | None = None


@dataclass(frozen=True)
class ShardFailure:
    """A shard that was given up after some attempts, with the last reason."""

    shard: Shard
    attempts: int
    reason: str


Outcome = ShardResult | ShardFailure | None
"""An executor yields these; None says that nothing was ready for a while."""

Executor = Callable[[WorkerConfig, Sequence[Shard]], Generator[Outcome]]
"""Encodes shards and yields their outcomes in any order."""
