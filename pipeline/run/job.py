"""Describes what a user asks for: one job, whose inputs become shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import InputFile, expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import Plan, plan_shards
from pipeline.messages import Executor
from pipeline.run.planning import ScanOnWorkers


@dataclass(frozen=True, kw_only=True)
class TableJob:
    """The settings by which a table is filled with the rows of a plan, from wherever they come.

    Attributes:
        uri: Address of the table, ending in .lance.
        token_budget: Number of tokens per forward pass. None chooses it from the device and its
            free memory.
        max_rejected: Largest share of rows that may be rejected.
        commit_every_s: Least number of seconds between two commits, and what a killed driver
            repeats. The pause is longer where commits take long, see `committer.pause_s`. 0 commits
            each shard by itself.
        on_duplicate: What to do when an id occurs twice: fail ("error"), or keep the "first" or the
            "last" row.
        new_generation: Whether a complete table with other settings or input is begun anew.
        index_columns: Metadata columns that are indexed.
        storage_options: Options of the store of table and inputs, as Lance names them.
    """

    uri: str
    token_budget: int | None = None
    max_rejected: float = 0.001
    commit_every_s: float = 10.0
    on_duplicate: str = "error"
    new_generation: bool = False
    index_columns: tuple[str, ...] = ()
    storage_options: dict[str, str] | None = field(default=None, repr=False)

    @property
    def table(self) -> Location:
        """Address of the table; no worker needs the working directory of the command for it."""
        return Location(self.uri, self.storage_options)


@dataclass(frozen=True, kw_only=True)
class EncodeJob(TableJob):
    """The settings of one `kalm encode`.

    Attributes:
        inputs: Paths, URLs and globs of the corpus.
        model: Hub id or directory of the model.
        revision: Revision of the hub id.
        ratios: Ratios to store, finest first.
        store_dtype: "float16", "float32", "int8" or "int4".
        compute_dtype: "bfloat16" or "float32", in which the encoder computes. None takes what the
            table records, or, for a new table, what suits the device.
        max_length: Number of tokens a passage is cut to.
        keep_text: Whether to store the raw text.
        fields: What the user said of how files are read: fields, columns, quotes, and which fields
            to keep as metadata columns.
        shard_size: Rows per shard, the unit of work and of commit.
        limit: Number of rows to encode, from the first on. None encodes all.
        split: Most tokens of a passage and tokens of overlap, to split documents into passages.
            None takes rows as passages.
    """

    inputs: tuple[str, ...]
    model: str
    revision: str | None = None
    ratios: tuple[int, ...] = (4,)
    store_dtype: str = "float16"
    compute_dtype: str | None = None
    max_length: int = 1024
    keep_text: bool = True
    fields: FieldOptions = field(default_factory=FieldOptions)
    shard_size: int = 1000
    limit: int | None = None
    split: tuple[int, int] | None = None

    def files(self) -> list[InputFile]:
        """List the input files.

        Raises:
            InputError: There is no usable input.
        """
        return expand_inputs(
            self.inputs, self.storage_options, self.fields.format, table=self.table.uri
        )


def plan_job(
    job: EncodeJob,
    files: Sequence[InputFile] | None = None,
    execute: Executor | None = None,
) -> Plan:
    """Cut the inputs of a job into shards.

    Args:
        job: What was asked for.
        files: Its input files, if they have been listed already.
        execute: Scans large inputs on workers. None scans all of them in this process.

    Raises:
        InputError: There is no usable input.
        IncompleteError: If workers failed for good.
    """
    return plan_shards(
        job.files() if files is None else files,
        shard_size=job.shard_size,
        limit=job.limit,
        fields=job.fields,
        storage_options=job.storage_options,
        scan_files=ScanOnWorkers(job.table, execute) if execute else None,
    )
