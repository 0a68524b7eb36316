"""A smaller table from a bigger one: coarser ratios or fewer bits, without a model or a GPU.

The rows are those of the version that is live when it starts. Shards, commits and resuming are the
same as when a corpus is encoded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import lance

from kalm_encoder.errors import InputError
from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.table.location import Location, address
from kalm_encoder.table.reader import PassageTable
from kalm_encoder.table.rows import build_rows, read_metadata, read_rows
from kalm_encoder.table.spec import FORMAT_VERSION, TableSpec
from kalm_encoder.version import __version__
from pipeline.corpus.erased import ErasedIds
from pipeline.corpus.inputs import InputFile, RowRange, range_hash
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Plan, Shard
from pipeline.messages import Executor, Place, ShardResult, Task, Work
from pipeline.run.driver import Summary, load
from pipeline.run.job import TableJob
from pipeline.table.claim import metadata_of
from pipeline.table.erasures import erasures, write_erasure
from pipeline.table.finish import indexed_columns
from pipeline.table.fragments import write_fragment
from pipeline.workers.local import in_process


def truncate(
    source: str,
    to: str,
    *,
    ratios: tuple[int, ...] | None = None,
    store_dtype: str | None = None,
    shard_size: int = 10_000,
    storage_options: dict[str, str] | None = None,
    execute: Executor = in_process,
) -> Summary:
    """Write the live rows of a table into another at coarser ratios or in another dtype.

    Args:
        source: Address of a complete table.
        to: Address of the new table.
        ratios: Ratios to store, each a multiple of one that `source` stores. None keeps them.
        store_dtype: "float16", "float32", "int8" or "int4". None keeps it.
        shard_size: Rows per shard.
        storage_options: Options of the store of both tables.
        execute: Does the shards: in this process or on Ray workers.

    Raises:
        InputError: If a ratio cannot be made, or there is nothing to do.
        TableError: If there is no complete table at `source`.
        CorruptRowError: If a row of `source` is not what was written.
    """
    table = PassageTable.open(source, storage_options=storage_options)
    old = table.spec
    spec = replace(
        old, ratios=ratios or old.ratios, store_dtype=store_dtype or old.store_dtype,
        format_version=FORMAT_VERSION, library_version=__version__,
    )  # fmt: skip
    for ratio in spec.ratios:
        old.source_ratio(ratio)
    if (spec.ratios, spec.store_dtype) == (old.ratios, old.store_dtype):
        raise InputError(
            f"{source} already has these ratios and this dtype: give another --ratios or "
            "--store-dtype"
        )
    if address(source) == address(to):
        raise InputError("a table cannot be truncated into itself: give --to another place")
    plan = _plan(table, source, shard_size)
    metadata = metadata_of(table.dataset)
    columns = tuple(indexed_columns(metadata))
    job = TableJob(uri=to, storage_options=storage_options, index_columns=columns)

    def work(new: TableSpec, erased: ErasedIds) -> Work:
        return TruncateWork(
            table=job.table, spec=new, source=address(source), version=table.version
        )

    summary = load(job, plan, spec, execute, work=work)
    for erasure in erasures(Location(source, storage_options)):
        write_erasure(job.table, erasure)
    return summary


def _plan(table: PassageTable, source: str, shard_size: int) -> Plan:
    """Cut the rows of a table into shards. Address and version stand for their content."""
    content = f"{address(source)} version {table.version}"
    shards = []
    for number, start in enumerate(range(0, len(table), shard_size)):
        rows = min(shard_size, len(table) - start)
        part = RowRange(start, rows, start + 1, rows, range_hash(content, start, rows))
        shards.append(Shard(number, InputFile(source, "lance"), Fields("id", "text"), part))
    if not shards:
        raise InputError(f"{source} has no rows")
    return Plan(tuple(shards))


@dataclass(frozen=True, kw_only=True)
class TruncateWork(Work):
    """Shards of one table to write into another.

    Attributes:
        spec: Spec of the new table.
        source: Address of the table that is read.
        version: Its version.
    """

    spec: TableSpec
    source: str
    version: int

    def start(self, place: Place) -> TruncateTask:
        """Open both tables."""
        source = PassageTable.open(
            self.source, version=self.version, storage_options=self.table.options
        )
        return TruncateTask(source, self.spec, self.table.dataset())


class TruncateTask(Task):
    """Both tables, opened."""

    def __init__(self, source: PassageTable, spec: TableSpec, target: lance.LanceDataset) -> None:
        self._source, self._spec, self._target = source, spec, target

    def do(self, unit: Shard) -> ShardResult:
        """Read one shard, verify it, and write it as the new table's spec says.

        Raises:
            CorruptRowError: If a row is not what was written.
        """
        table, shard = self._source, unit
        old, new = table.spec, self._spec
        finest = new.ratios[0]
        stored = old.source_ratio(finest)
        columns = ["id", "text_hash", "num_tokens", "truncated"]
        columns += [
            f"states_r{stored}",
            f"checksum_r{stored}",
            *(["text"] if old.keep_text else []),
        ]
        columns += old.metadata_names
        rows = table.dataset.to_table(
            columns=columns, offset=shard.rows.start, limit=shard.rows.num_rows
        )
        passages = read_rows(old, rows, finest, uri=table.uri)
        ids, packed = list(passages), PackedStates.of(list(passages.values()))
        texts = rows["text"].to_pylist() if old.keep_text else [""] * len(ids)
        made = build_rows(
            new, ids, texts, packed, shard.id,
            hashes=rows["text_hash"].to_pylist(), metadata=read_metadata(old, rows, uri=table.uri),
        )  # fmt: skip
        tokens = int(packed.num_tokens.sum())
        return ShardResult(
            shard, write_fragment(made, self._target), num_rows=len(ids), num_tokens=tokens,
            padded_tokens=tokens, num_truncated=int(packed.truncated.sum()),
        )  # fmt: skip
