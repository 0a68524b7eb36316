"""Planning a corpus of 8 files: one worker against this process, and two workers against one.

Each worker has one CPU to itself, and so has this process. The clock of a cluster starts when its
workers are ready.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ray import cloudpickle

from kalm_encoder.table.location import Location
from pipeline.messages import Outcome, Place, Unit, Work
from pipeline.run.job import EncodeJob, plan_job
from pipeline.run.plan_work import PlanWork
from pipeline.table.steps import DoPart
from pipeline.workers.on_ray.actor import OnRay, RayOptions
from tests.bench.data import FOLDER, bar, on_one_cpu, spread, timed
from tests.bench.table import random_texts

FILES, COPIES, PASSAGES, ROUNDS = 8, 15, 20_000, 5


@dataclass(frozen=True, kw_only=True)
class PlanOnOneCpu(PlanWork):
    """Waits until all workers are there, and stays on one CPU."""

    num_workers: int

    def load(self, place: Place) -> DoPart:
        folder = Path(self.table.uri)
        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < self.num_workers:
            time.sleep(0.01)
        pids = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
        pin(pids.index(os.getpid()))
        with contextlib.suppress(FileExistsError), (folder / "began").open("x") as file:
            file.write(str(time.time()))
        return super().load(place)


def pin(number: int) -> None:
    """Keep all threads of this process on one of its CPUs."""
    cpu = sorted(os.sched_getaffinity(0))[number]
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {cpu})


def main() -> list[str]:
    # The workers get our packages, not this one.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    job = EncodeJob(inputs=(str(_corpus()),), uri="planned.lance", model="")
    here, one, two = [], [], []
    plan = plan_job(job)  # what is read first is read from the disk
    for _ in range(ROUNDS):
        here.append(on_one_cpu(_here, replace(job, limit=plan.num_rows)))  # in one thread
        one.append(_on_ray(job, 1))
        two.append(_on_ray(job, 2))
    size = sum(os.path.getsize(file.path) for file in job.files()) / 1e9
    for name, seconds in {"this process": here, "one worker": one, "two workers": two}.items():
        print(f"{size:.2f} GB in {FILES} files planned by {name}: {spread(seconds)} s")
    here_s, one_s, two_s = map(statistics.median, (here, one, two))
    return [
        bar("planning_one_worker", here_s / one_s, ">=", 0.9),
        bar("planning_two_workers", one_s / two_s, ">=", 1.6),
    ]


def _corpus() -> Path:
    """Write the files of 142 MB each, if they are not there from the last run."""
    folder = FOLDER / "planning"
    folder.mkdir(parents=True, exist_ok=True)
    texts = [text * 4 for text in random_texts(PASSAGES)]
    rows = "".join(json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    for number in range(FILES):
        file = folder / f"{number}.jsonl"
        if not file.exists():
            file.write_text(rows * COPIES)
    return folder


def _here(job: EncodeJob) -> float:
    return timed(lambda: plan_job(job))


def _on_ray(job: EncodeJob, num_workers: int) -> float:
    """Return the seconds from the moment that the workers are ready to the plan."""
    options = RayOptions(address="local", num_workers=num_workers, cpus_per_worker=1)
    with tempfile.TemporaryDirectory() as folder, OnRay(options) as on_ray:

        def execute(work: Work, units: Sequence[Unit]) -> Generator[Outcome]:
            given = {**vars(work), "table": Location(folder), "num_workers": num_workers}
            yield from on_ray(PlanOnOneCpu(**given), units)

        plan_job(job, execute=execute)
        return time.time() - float(Path(folder, "began").read_text())
