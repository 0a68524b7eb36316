"""Which unit goes to which worker, and what becomes of the units of one that dies.

Ray retries nothing here. The queue counts attempts, so that the unit that fails has a name. Only
units and fragment metadata travel. A worker that goes costs at most the units it had.

The cost per unit does not grow with the number of units: answers arrive in a queue, where nobody
searches for them. A step looks at each worker, which takes far less than the worker's unit.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

from pipeline.messages import Outcome, Unit, Work
from pipeline.workers.on_ray.cluster import RayOptions
from pipeline.workers.on_ray.metrics import RunMetrics
from pipeline.workers.on_ray.pool import Answers, WorkerHandle, WorkerPool, call, reason_of
from pipeline.workers.unit_queue import UnitQueue, short_last

TICK_S = 1.0
"""How long a step waits for an answer: the driver can commit and look at the cluster that often."""


@dataclass(frozen=True)
class _Task:
    worker: WorkerHandle
    unit: Unit
    deadline: float


class Dispatcher:
    """Units that wait, units under way, and the workers that have them.

    Args:
        worker: Class of the actors.
        options: What the workers ask for, and how many there are.
        work: What each worker loads.
        units: Units to do, in their order.

    Raises:
        InputError: If no node can hold one worker.
    """

    def __init__(
        self, worker: type, options: RayOptions, work: Work, units: Sequence[Unit]
    ) -> None:
        self._unit_timeout_s = options.unit_timeout_s
        self._answers: Answers = queue.SimpleQueue()
        self._pool = WorkerPool(worker, options, work, self._answers)
        self._queue = UnitQueue(*short_last(units, 2 * self._pool.size))
        self._tasks: dict[Future[Any], _Task] = {}  # the oldest first
        self._metrics = RunMetrics(work.table.uri)

    def num_unfinished(self) -> int:
        """Return how many units have no outcome yet."""
        return len(self._queue) + len(self._queue.suspects) + len(self._tasks)

    def step(self) -> list[Outcome]:
        """Hand out units, wait a moment, and return what has come back.

        Workers have their next units before the caller spends time on the outcomes.

        Raises:
            KalmError: If workers cannot start or keep dying, or none became ready in time.
        """
        self._pool.adjust(self.num_unfinished())
        outcomes: list[Outcome] = []
        for future in self._arrived():
            if future in self._tasks:
                outcomes += self._finished(future)
            else:
                self._pool.started(future)
        outcomes += self._replace_overdue()
        self._queue.clear_suspects(self._pool.nodes)
        self._metrics.set_workers(len(self._pool.ready))
        self._hand_out()
        return outcomes

    def close(self) -> None:
        """End the workers, and take them off the metrics page."""
        self._pool.close()
        self._metrics.set_workers(0)

    def _hand_out(self) -> None:
        """Give units to the workers with fewest; a suspect goes alone when all else is done."""
        for load in range(self._pool.in_flight):
            # More than one unit ahead only while there are plenty: all workers end together.
            spare = len(self._pool.ready) * max(0, load - 1)
            for worker in self._pool.ready:
                if len(worker.tasks) == load and len(self._queue) > spare:
                    self._submit(worker, self._queue.take(worker.path))
        if not self._queue and not self._tasks and self._queue.suspects and self._pool.ready:
            suspect, _ = self._queue.suspects.popleft()
            self._submit(next(iter(self._pool.ready)), suspect)

    def _submit(self, worker: WorkerHandle, unit: Unit) -> None:
        future = call(self._answers, worker.actor.do, unit)
        self._tasks[future] = _Task(worker, unit, time.monotonic() + self._unit_timeout_s)
        worker.path = unit.path
        worker.tasks.add(future)

    def _arrived(self) -> list[Future[Any]]:
        """Wait for an answer, at most a tick, and return all that are there."""
        try:
            arrived = [self._answers.get(timeout=TICK_S)]
        except queue.Empty:
            return []
        while not self._answers.empty():
            arrived.append(self._answers.get())
        return arrived

    def _finished(self, future: Future[Any]) -> Sequence[Outcome]:
        task = self._tasks.pop(future)
        task.worker.tasks.remove(future)
        error = future.exception()
        if isinstance(error, RayTaskError):
            return self._queue.failed(task.unit, reason_of(error))
        if isinstance(error, RayError):
            return self._remove_worker(task.worker, [task.unit], reason_of(error))
        result = future.result()
        self._pool.deaths.clear()
        self._metrics.add(result)
        return [result]

    def _remove_worker(
        self, worker: WorkerHandle, lost: list[Unit], reason: str
    ) -> Sequence[Outcome]:
        """Take back the units of a dead worker: as suspects, unless its node died with it."""
        for future in worker.tasks:
            if not future.done() or future.exception():  # what it finished arrives in a moment
                lost.append(self._tasks.pop(future).unit)
        self._pool.remove(worker, reason)
        if worker.node in self._pool.nodes:
            reason = f"its worker died: {reason}"
            return [f for unit in lost for f in self._queue.failed(unit, reason, worker.node)]
        for unit in lost:
            self._queue.put_back(unit)
        return []

    def _replace_overdue(self) -> Sequence[Outcome]:
        """Replace the worker of the oldest call if that has taken too long."""
        future, task = next(iter(self._tasks.items()), (None, None))
        if not future or not task or future.done() or task.deadline > time.monotonic():
            return []
        return self._remove_worker(task.worker, [], f"no result after {self._unit_timeout_s:.0f} s")
