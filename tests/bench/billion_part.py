"""One command of `tests.bench.billion`, in a process of its own; it announces its steps.

`python -m tests.bench.billion_part encode FOLDER`
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lance
import numpy as np
from ray import cloudpickle

from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.model import checkpoint
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.shards import Shard, ShardReader
from pipeline.messages import Executor, Outcome, Place, ShardResult, Task, Unit, Work
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.claim import CHANGING
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_fragment
from pipeline.table.steps import Steps, StepWork
from pipeline.upkeep.sync import sync
from pipeline.upkeep.truncate import truncate
from pipeline.upkeep.verify import verify
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.on_ray.actor import OnRay, RayOptions

DIM, RATIO, COARSER = 8, 32, 64
SHARD_SIZE = 50_000


@dataclass(frozen=True, kw_only=True)
class StandIn(Work):
    """Makes random states in place of those of a model, one per passage, and writes them."""

    spec: TableSpec

    def start(self, place: Place) -> StandInTask:
        return StandInTask(self.table.dataset(), self.spec)


class StandInTask(Task):
    def __init__(self, dataset: lance.LanceDataset, spec: TableSpec) -> None:
        self._dataset, self._spec = dataset, spec

    def do(self, unit: Shard) -> ShardResult:
        read = ShardReader().read(unit)
        ids, texts = [p.id for p in read.passages], [p.text for p in read.passages]
        states = np.random.default_rng(unit.number).standard_normal((len(ids), self._spec.dim))
        packed = PackedStates(
            states.astype(np.float32), np.full(len(ids), 12), np.zeros(len(ids), bool)
        )
        rows = build_rows(self._spec, ids, texts, packed, unit.id)
        fragment = write_fragment(rows, self._dataset)
        return ShardResult(unit, fragment, len(ids), tuple(read.rejects), compute_dtype="float32")


class Announcing:
    """Does the work on Ray and says when shards are next; all other steps say it themselves."""

    def __init__(self, on_ray: OnRay) -> None:
        self._on_ray = on_ray

    def __call__(self, work: Work, units: Sequence[Unit]) -> Generator[Outcome]:
        if isinstance(work, EncodeWork):
            work = StandIn(table=work.table, spec=work.spec)
        if not isinstance(work, StepWork):
            announce("shards")
        yield from self._on_ray(work, units)


def announce(name: str) -> None:
    """Print that a step begins."""
    print("\n@step " + json.dumps([name, time.monotonic()]), flush=True)


def announce_steps() -> None:
    """Let every step of a table say its name when it begins."""
    do = Steps.do

    def announced(self: Steps, name: str, *rest: Any, **more: Any) -> Iterator[Any]:
        announce(name)
        yield from do(self, name, *rest, **more)

    Steps.do = announced  # type: ignore[method-assign]


def announce_changes() -> None:
    """Let what a sync does in the driver say its name when it begins."""

    def wrap(method: str, name: str) -> None:
        do = getattr(SealedTable, method)

        def announced(self: SealedTable, *rest: Any, **more: Any) -> Any:
            if self.state == CHANGING:
                announce(name)
            return do(self, *rest, **more)

        setattr(SealedTable, method, announced)

    wrap("finish", "finishing")


def job(folder: Path, corpus: str) -> EncodeJob:
    return EncodeJob(
        inputs=(f"{folder}/{corpus}/*.jsonl",), uri=f"{folder}/t.lance", model="kalm-demo",
        ratios=(RATIO,), shard_size=SHARD_SIZE, on_duplicate="first",
    )  # fmt: skip


def encode(folder: Path, execute: Executor) -> None:
    files = checkpoint.resolve("kalm-demo", None)
    like = TableSpec(
        model=str(files.path), revision=None, fingerprint=files.fingerprint,
        files_hash=files.files_hash, weights_hash=files.weights_hash, dim=DIM,
        max_length=1024, ratios=(RATIO,), store_dtype="float16", compute_dtype="float32",
    )  # fmt: skip
    print(run(job(folder, "corpus"), execute, like=like))


def main(command: str, folder: Path) -> None:
    # The workers get our packages, not this one.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    announce_steps()
    announce_changes()
    announce("start")
    table = f"{folder}/t.lance"
    with OnRay(RayOptions(num_workers=len(os.sched_getaffinity(0)), cpus_per_worker=1)) as on_ray:
        execute = Announcing(on_ray)
        if command == "encode":
            encode(folder, execute)
        elif command == "verify":
            report = verify(table, execute=execute)
            assert not report.num_problems, report.problems
        elif command == "truncate":
            to = f"{folder}/small.lance"
            truncate(table, to, ratios=(COARSER,), shard_size=SHARD_SIZE, execute=execute)
        else:
            changes, _ = sync(job(folder, "changed"), execute, on_duplicate="first")
            print(changes.counts())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
