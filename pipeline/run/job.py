"""What a user asks for: one job, and its plan."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import absolute, expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import Plan, plan_shards

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What `kalm encode` was asked to do.

    Attributes:
        inputs: paths, URLs and globs.
        uri: of the table, ending in .lance.
        model: hub id or directory.
        revision: of the hub id.
        ratios: to store, finest first.
        store_dtype: "float16", "float32", "int8" or "int4".
        max_length: tokens a passage is cut to.
        keep_text: whether to store the raw text.
        fields: fields the user named.
        shard_size: rows a shard: the unit of work and of commit.
        limit: encode only the first so many rows.
        token_budget: tokens a forward; None chooses by device and free memory.
        compile: run the encoder through torch.compile.
        max_rejected: largest share of rows that may be rejected.
        commit_every_s: seconds between two commits at least, and what a killed driver repeats;
            longer where commits take long, see `committer.pause_s`. 0 commits each shard by itself.
        on_duplicate: of the rows of one id keep the "first" or "last", or refuse ("error").
        new_generation: begin anew where a complete table has other settings or input.
        storage_options: for table and inputs, as Lance names them.
    """

    inputs: tuple[str, ...]
    uri: str
    model: str
    revision: str | None = None
    ratios: tuple[int, ...] = (4,)
    store_dtype: str = "float16"
    max_length: int = 1024
    keep_text: bool = True
    fields: FieldOptions = field(default_factory=FieldOptions)
    shard_size: int = 1000
    limit: int | None = None
    token_budget: int | None = None
    compile: bool = False
    max_rejected: float = 0.001
    commit_every_s: float = 10.0
    on_duplicate: str = "error"
    new_generation: bool = False
    storage_options: dict[str, str] | None = field(default=None, repr=False)

    @property
    def table(self) -> Location:
        """Address of the table, absolute because workers have another working directory."""
        return Location(absolute(self.uri), self.storage_options)


def plan_job(job: EncodeJob, files: Sequence[str] | None = None) -> Plan:
    """Cut the inputs of a job into shards.

    Args:
        job: what was asked for.
        files: its inputs, where they have been listed already.

    Raises:
        InputError: no usable input.
    """
    began = time.monotonic()
    plan = plan_shards(
        expand_inputs(job.inputs, job.storage_options) if files is None else files,
        shard_size=job.shard_size,
        limit=job.limit,
        fields=job.fields,
        storage_options=job.storage_options,
    )
    logger.info("%d shards planned in %.1f s", len(plan.shards), time.monotonic() - began)
    return plan
