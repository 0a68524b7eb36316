"""Steps that touch every row: one worker on Ray against this process, and two against one.

A rate counts from when each worker has sent its first result, so that starting Ray, its workers and
their imports is left out. A worker has one CPU.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Plan, Shard
from pipeline.messages import Executor, Outcome, ShardResult, Unit, Work
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
from tests.bench.data import FOLDER, bar

FRAGMENTS, FRAGMENT_ROWS, UNITS = 10, 100_000, 40
TOKENS, DIM = 16, 16
"""Small rows, so that the table is small and the work per row is most of the time."""
NAMES = {"CheckRows": "verify", "TruncateWork": "truncate"}


def main() -> list[str]:
    uri = _table()
    part_bytes = (
        TableRows(Location(uri).dataset()).num_bytes() * 11 // (10 * UNITS)
    )  # no fragment in five
    rates: dict[int, dict[str, float]] = {}
    for workers in (0, 1, 2):
        with ExitStack() as stack:
            execute: Executor = in_process
            if workers:
                options = RayOptions(num_workers=workers, cpus_per_worker=1)
                execute = stack.enter_context(OnRay(options))
            clock = _Clock(execute, max(1, workers))
            verify(uri, execute=clock, part_bytes=part_bytes)
            _truncate(uri, clock)
        rates[workers] = clock.rates
        for name, (units, seconds) in clock.took.items():
            where = f"{workers} on Ray" if workers else "this process"
            rows = units * FRAGMENTS * FRAGMENT_ROWS / UNITS
            print(f"{name}, {where}: {rows / seconds:,.0f} rows/s over {seconds:.0f} s", flush=True)
    bars = []
    for name in NAMES.values():
        alone, one, two = (rates[workers][name] for workers in (0, 1, 2))
        bars.append(bar(f"steps_{name}_two_workers", two / one, ">=", 1.7))
        bars.append(bar(f"steps_{name}_one_on_ray", one / alone, ">=", 0.9))
    return bars


def _truncate(uri: str, execute: Executor) -> None:
    target = FOLDER / "steps-int8.lance"
    shutil.rmtree(target, ignore_errors=True)
    rows = FRAGMENTS * FRAGMENT_ROWS // UNITS
    truncate(uri, str(target), store_dtype="int8", shard_size=rows, execute=execute)
    shutil.rmtree(target)


class _Clock:
    """An executor that notes how fast the units of each work come back.

    Attributes:
        took: Units that came after each worker had sent one, and their seconds, by name.
    """

    def __init__(self, execute: Executor, workers: int) -> None:
        self._execute, self._workers = execute, workers
        self.took: dict[str, tuple[int, float]] = {}

    def __call__(self, work: Work, units: Sequence[Unit]) -> Generator[Outcome]:
        arrived = []
        for outcome in self._execute(work, units):
            if outcome is not None:
                arrived.append(time.perf_counter())
            yield outcome
        if name := NAMES.get(type(work).__name__):
            first = self._workers - 1
            self.took[name] = (len(arrived) - 1 - first, arrived[-1] - arrived[first])

    @property
    def rates(self) -> dict[str, float]:
        """Units per second by name."""
        return {name: units / seconds for name, (units, seconds) in self.took.items()}


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


def _shard(number: int) -> Shard:
    rows = RowRange(number, FRAGMENT_ROWS, 1, FRAGMENT_ROWS, f"{number:032x}")
    return Shard(number, InputFile("none.jsonl", "jsonl"), Fields("id", "text"), rows)
