"""A smaller table from a bigger one: coarser ratios or fewer bits, without a model or a GPU.

The rows are those of the version that is live when it starts. Shards, commits and resuming are the
same as when a corpus is encoded.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace

import lance
import pyarrow as pa
import pyarrow.compute as pc

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
from pipeline.run.run_files import TRUNCATING
from pipeline.table.claim import metadata_of
from pipeline.table.erasures import erasures, write_erasure
from pipeline.table.finish import FRAGMENT_ROWS, indexed_columns
from pipeline.table.fragments import write_fragment
from pipeline.upkeep.row_ranges import TableRows
from pipeline.workers.local import in_process

SHARD_BYTES = 256 << 20
"""Bytes of a shard, about, in the larger of the two tables. The fragments that shards become need
not be merged, and a billion passages are some tens of thousands of shards."""


def truncate(
    source: str,
    to: str,
    *,
    ratios: tuple[int, ...] | None = None,
    store_dtype: str | None = None,
    shard_size: int = FRAGMENT_ROWS,
    storage_options: dict[str, str] | None = None,
    execute: Executor = in_process,
) -> Summary:
    """Write the live rows of a table into another at coarser ratios or in another dtype.

    Args:
        source: Address of a complete table.
        to: Address of the new table.
        ratios: Ratios to store, each a multiple of one that `source` stores. None keeps them.
        store_dtype: "float16", "float32", "int8" or "int4". None keeps it.
        shard_size: Most rows per shard; where rows are large, SHARD_BYTES makes it smaller.
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
    plan = _plan(TableRows(table.dataset), address(source), table.version, old, spec, shard_size)
    metadata = metadata_of(table.dataset)
    columns = tuple(indexed_columns(metadata))
    job = TableJob(uri=to, storage_options=storage_options, index_columns=columns)

    def work(new: TableSpec, erased: ErasedIds) -> Work:
        return TruncateWork(
            table=job.table, spec=new, source=address(source), version=table.version
        )

    summary = load(job, plan, spec, execute, work=work, doing=TRUNCATING)
    for erasure in erasures(Location(source, storage_options)):
        write_erasure(job.table, erasure)
    return summary


def _plan(
    rows: TableRows, uri: str, version: int, old: TableSpec, new: TableSpec, most: int
) -> Plan:
    """Cut the rows of a table into shards. Address and version stand for their content."""
    content = f"{uri} version {version}"
    # A shard is as large as it is in the larger of the two tables: a worker has its rows in memory.
    most_bytes = SHARD_BYTES / max(1.0, new.bytes_per_token / old.bytes_per_token)
    shards = []
    for number, (start, count) in enumerate(rows.cut(most_bytes, most)):
        part = RowRange(start, count, start + 1, count, range_hash(content, start, count))
        shards.append(Shard(number, InputFile(uri, "lance"), Fields("id", "text"), part))
    if not shards:
        raise InputError(f"{uri} has no rows")
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
        self._rows = TableRows(source.dataset)

    def do(self, unit: Shard) -> ShardResult:
        """Read one shard, verify it, and write it as the new table's spec says.

        Raises:
            CorruptRowError: If a row is not what was written.
        """
        old, new, shard = self._source.spec, self._spec, unit
        stored = old.source_ratio(new.ratios[0])
        columns = ["id", "text_hash", "num_tokens", "truncated"]
        columns += [f"states_r{stored}", f"checksum_r{stored}", *old.metadata_names]
        columns += ["text"] if old.keep_text else []
        began, watch = time.time(), _Watch()
        made: list[pa.Table] = []
        for batch in self._rows.batches(shard.rows.start, shard.rows.num_rows, columns):
            watch.note("read")
            made.append(self._converted(pa.Table.from_batches([batch]), shard.id))
            watch.note("convert")
        rows = pa.concat_tables(made)
        fragment = write_fragment(rows, self._target)
        watch.note("write")
        tokens = pc.sum(rows["num_tokens"]).as_py()
        return ShardResult(
            shard, fragment, num_rows=len(rows), num_tokens=tokens, padded_tokens=tokens,
            num_truncated=pc.sum(rows["truncated"]).as_py(), seconds=watch.seconds,
            worker=f"{socket.gethostname()}:{os.getpid()}", began=began,
        )  # fmt: skip

    def _converted(self, rows: pa.Table, shard_id: str) -> pa.Table:
        """Return rows of the source as the new table has them."""
        old, new, uri = self._source.spec, self._spec, self._source.uri
        passages = read_rows(old, rows, new.ratios[0], uri=uri)
        ids = list(passages)
        return build_rows(
            new, ids,
            rows["text"].to_pylist() if old.keep_text else [""] * len(ids),
            PackedStates.of(list(passages.values())), shard_id,
            hashes=rows["text_hash"].to_pylist(), metadata=read_metadata(old, rows, uri=uri),
        )  # fmt: skip


class _Watch:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._at = time.perf_counter()

    def note(self, stage: str) -> None:
        """Count the time since the last note, or since the start, for a stage."""
        at = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + at - self._at
        self._at = at
