"""Steps that touch every row: one worker on Ray against this process, and two against one.

A rate counts from when each worker has sent its first result, so that starting Ray, its workers and
their imports is left out. A worker has one CPU to itself, and so has this process.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import lance
import numpy as np
import psutil
import pyarrow as pa

from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Plan, Shard
from pipeline.messages import Executor, Outcome, ShardResult, Unit, Work
from pipeline.table.duplicates import find_repeated
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_fragment
from pipeline.table.ledger import Ledger
from pipeline.table.publish import publish
from pipeline.table.steps import Steps
from pipeline.upkeep.row_ranges import TableRows
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from pipeline.workers.on_ray.actor import OnRay, RayOptions
from tests.bench.data import FOLDER, bar, on_one_cpu

FRAGMENTS, FRAGMENT_ROWS, UNITS = 10, 100_000, 40
TOKENS, DIM = 16, 16
"""Small rows, so that the table is small and the work per row is most of the time."""
IDS, IDS_PER_PART, REPEATED = 20_000_000, 1_000_000, 100
"""Rows among which repeated ids are found, those of one part, and one in so many of the first half
has an id of the second."""
WORKS = {
    "verify": ("CheckRows",),
    "truncate": ("TruncateWork",),
    "duplicates": ("HashIds", "FindRepeated"),
}
"""The works of each step."""


def main() -> list[str]:
    uri, ids = _table(), _ids()
    part_bytes = (
        TableRows(Location(uri).dataset()).num_bytes() * 11 // (10 * UNITS)
    )  # no fragment in five
    took = [on_one_cpu(_seconds, uri, ids, part_bytes, 0)]
    took += [_seconds(uri, ids, part_bytes, workers) for workers in (1, 2)]
    bars = []
    for step in WORKS:
        alone, one, two = (seconds[step] for seconds in took)
        least = 1.5 if step == "duplicates" else 1.7
        bars.append(bar(f"steps_{step}_two_workers", one / two, ">=", least))
        bars.append(bar(f"steps_{step}_one_on_ray", alone / one, ">=", 0.9))
    return bars


def _find_repeated(uri: str, execute: Executor) -> None:
    table = Location(uri)
    folder = table / "exchanged"
    repeated = find_repeated(Steps(execute), table, table.dataset(), "first", folder)
    assert repeated.count == IDS // 2 // REPEATED, repeated.count
    shutil.rmtree(folder.uri)


def _seconds(uri: str, ids: str, part_bytes: int, workers: int) -> dict[str, float]:
    """Return the seconds of each step on so many workers, or in this process if there is none."""
    with ExitStack() as stack:
        execute: Executor = in_process
        if workers:
            options = RayOptions(num_workers=workers, cpus_per_worker=1)
            execute = stack.enter_context(OnRay(options))
        clock = _Clock(execute, max(1, workers))
        verify(uri, execute=clock, part_bytes=part_bytes)
        _truncate(uri, clock)
        _find_repeated(ids, clock)
    found = {}
    for step, works in WORKS.items():
        found[step] = sum(clock.seconds[name] for name in works)
        where = f"{workers} on Ray" if workers else "this process"
        rows = IDS if step == "duplicates" else FRAGMENTS * FRAGMENT_ROWS
        print(f"{step}, {where}: {rows / found[step]:,.0f} rows/s, {found[step]:.1f} s", flush=True)
    return found


def _truncate(uri: str, execute: Executor) -> None:
    target = FOLDER / "steps-int8.lance"
    shutil.rmtree(target, ignore_errors=True)
    rows = FRAGMENTS * FRAGMENT_ROWS // UNITS
    truncate(uri, str(target), store_dtype="int8", shard_size=rows, execute=execute)
    shutil.rmtree(target)


def pin_workers() -> None:
    """Keep all threads of each worker on one CPU: it asks Ray for one but may use more."""
    cpus = sorted(os.sched_getaffinity(0))
    found = [p for p in psutil.process_iter(["name"]) if p.info["name"].startswith("ray::Worker")]
    for number, process in enumerate(sorted(found, key=lambda process: process.pid)):
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {cpus[number % len(cpus)]})


class _Clock:
    """An executor that measures how long the units of each work take.

    Attributes:
        seconds: What all units would take at the rate at which they came once each worker had sent
            one, by the name of their work.
    """

    def __init__(self, execute: Executor, workers: int) -> None:
        self._execute, self._workers = execute, workers
        self.seconds: dict[str, float] = {}

    def __call__(self, work: Work, units: Sequence[Unit]) -> Generator[Outcome]:
        arrived: list[float] = []
        for outcome in self._execute(work, units):
            if outcome is not None:
                if len(arrived) < self._workers:
                    pin_workers()
                arrived.append(time.perf_counter())
            yield outcome
        first = self._workers - 1
        if len(arrived) > self._workers:
            rate = (len(arrived) - 1 - first) / (arrived[-1] - arrived[first])
            self.seconds[type(work).__name__] = len(arrived) / rate


def _table() -> str:
    """Return a live table of small rows; it is made once and kept for the next run."""
    uri = str(FOLDER / f"steps-{FRAGMENTS * FRAGMENT_ROWS}.lance")
    if Path(uri, "_refs", "tags", "live.json").exists():
        return uri
    shutil.rmtree(uri, ignore_errors=True)
    spec = TableSpec(
        model="none", revision=None, fingerprint="none", dim=DIM, max_length=512, ratios=(4,),
        keep_text=False, compute_dtype="float32",
    )  # fmt: skip
    shards = tuple(map(_shard, range(FRAGMENTS)))
    table = Location(uri)
    ledger = Ledger.begin(table, spec, Plan(shards))
    counts = np.full(FRAGMENT_ROWS, TOKENS)
    states = np.random.default_rng(0).standard_normal((FRAGMENT_ROWS * TOKENS // 4, DIM))
    passages = PackedStates(states.astype(np.float16), counts, np.zeros(FRAGMENT_ROWS, np.bool_))
    for shard in shards:
        ids = [f"p{shard.number}-{i}" for i in range(FRAGMENT_ROWS)]
        rows = build_rows(spec, ids, ids, passages, shard.id)
        fragment = write_fragment(rows, ledger.dataset)
        ledger.commit([ShardResult(shard, fragment, FRAGMENT_ROWS, compute_dtype="float32")])
    ledger.seal()
    SealedTable(table).finish(Steps(in_process), compact=False)
    publish(table)
    return uri


def _ids() -> str:
    """Return a dataset of ids, of which some are repeated far from each other; it is kept."""
    uri = str(FOLDER / f"steps-ids-{IDS}.lance")
    if not Path(uri).exists():
        schema = pa.schema([pa.field("id", pa.string())])

        def batches() -> Iterator[pa.RecordBatch]:
            for start in range(0, IDS, IDS_PER_PART):
                rows = np.arange(start, start + IDS_PER_PART)
                rows[(rows < IDS // 2) & (rows % REPEATED == 0)] += IDS // 2
                yield pa.record_batch([[f"p{row:09d}" for row in rows.tolist()]], schema=schema)

        lance.write_dataset(batches(), uri, schema=schema, max_rows_per_file=IDS_PER_PART)
    return uri


def _shard(number: int) -> Shard:
    rows = RowRange(number, FRAGMENT_ROWS, 1, FRAGMENT_ROWS, f"{number:032x}")
    return Shard(number, InputFile("none.jsonl", "jsonl"), Fields("id", "text"), rows)
