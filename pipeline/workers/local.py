"""The executor without Ray: it does the units of a work in this process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from pipeline import logs
from pipeline.messages import (
    ANYWHERE,
    STEP_IN_FLIGHT,
    Failure,
    Outcome,
    Place,
    Unit,
    Work,
    shards_in_flight,
)


def in_process(work: Work, units: Sequence[Unit], place: Place = ANYWHERE) -> Generator[Outcome]:
    """Do units in this process and yield their outcomes in order; they overlap as in a Ray worker.

    Raises:
        KalmError: If the work cannot be loaded.
    """
    task = work.start(place)

    def attempt(unit: Unit) -> Outcome:
        try:
            with logs.in_shard(unit.id):
                return task.do(unit)
        except Exception as error:  # any error belongs to its unit; the others go on
            return Failure(unit, 1, f"{type(error).__name__}: {error}")

    waiting = iter(units)
    count = STEP_IN_FLIGHT
    if work.loads_model:
        count = shards_in_flight(len(os.sched_getaffinity(0)), on_gpu=task.on_gpu)
    with ThreadPoolExecutor(count, "unit") as pool:
        running = deque(pool.submit(attempt, unit) for unit in islice(waiting, count))
        try:
            while running:
                outcome = running.popleft().result()
                running.extend(pool.submit(attempt, unit) for unit in islice(waiting, 1))
                yield outcome
        finally:
            task.stop()
