"""What a worker is given and what comes back: the words in which driver and executors speak."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import Shard
from pipeline.logs import LogOptions

IN_FLIGHT = 3
"""Shards a worker has at once: one is read or tokenised, one on the device, one written."""


@dataclass(frozen=True)
class WorkerConfig:
    """What every worker needs to encode any shard of a job.

    Attributes:
        uri: of the table.
        spec: of the table; its fingerprint must be that of the model this worker finds.
        token_budget: tokens a forward; None chooses by device and free memory.
        threads: CPU threads of the model; None leaves torch's own choice.
        compile: run the encoder through torch.compile.
        gpu_share: of a GPU's memory that is this worker's.
        storage_options: for table and inputs; passed in memory, never written.
        logs: how a worker logs, and the id of the run.
    """

    uri: str
    spec: TableSpec
    token_budget: int | None = None
    threads: int | None = None
    compile: bool = False
    gpu_share: float = 1.0
    storage_options: dict[str, str] | None = field(default=None, repr=False)
    logs: LogOptions = field(default_factory=LogOptions)


@dataclass(frozen=True)
class ShardResult:
    """A written, uncommitted shard.

    Attributes:
        shard: which.
        fragment: Lance fragment metadata as JSON; None where every row was rejected.
        num_rows: rows written.
        rejects: rows that were not.
        num_tokens: real tokens encoded.
        padded_tokens: tokens the encoder computed, padding included.
        num_truncated: passages cut to max_length.
        seconds: by stage: read, tokenise, queued (for the device, which was busy), forward, pool
            and write add up to the shard's time; idle is the device's, waiting for this shard.
        worker: host and process that encoded it; "" where nobody did.
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


@dataclass(frozen=True)
class ShardFailure:
    """A shard that was given up, after how many attempts, and the last reason."""

    shard: Shard
    attempts: int
    reason: str


Outcome = ShardResult | ShardFailure | None
"""What an executor yields; None is a tick while nothing is ready."""

Executor = Callable[[WorkerConfig, Sequence[Shard]], Generator[Outcome]]
