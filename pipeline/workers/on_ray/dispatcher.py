"""Which shard goes to which worker, and what becomes of the shards of one that dies.

Ray retries nothing here. The queue counts attempts, so that the shard that fails has a name. Only
shards and fragment metadata travel. A worker that goes costs at most the shards it had.

The cost per shard does not grow with the number of shards: answers arrive in a queue, where nobody
searches for them. A step looks at each worker, which takes far less than the worker's shard.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayError, RayTaskError

from pipeline.corpus.shards import Shard
from pipeline.messages import Outcome, ShardResult, WorkerConfig
from pipeline.workers.on_ray.cluster import RayOptions
from pipeline.workers.on_ray.metrics import RunMetrics
from pipeline.workers.on_ray.pool import Answers, WorkerHandle, WorkerPool, call, reason_of
from pipeline.workers.shard_queue import ShardQueue, short_last

TICK_S = 1.0
"""How long a step waits for an answer: the driver can commit and look at the cluster that often."""


@dataclass(frozen=True)
class _Task:
    worker: WorkerHandle
    shard: Shard
    deadline: float


class Dispatcher:
    """Shards that wait, shards under way, and the workers that have them.

    Args:
        worker: Class of the actors.
        options: What the workers ask for, and how many there are.
        config: What each worker loads.
        shards: Shards to encode, in plan order.

    Raises:
        InputError: If no node can hold one worker.
    """

    def __init__(
        self, worker: type, options: RayOptions, config: WorkerConfig, shards: Sequence[Shard]
    ) -> None:
        self._shard_timeout_s = options.shard_timeout_s
        self._answers: Answers = queue.SimpleQueue()
        self._pool = WorkerPool(worker, options, config, self._answers)
        self._queue = ShardQueue(*short_last(shards, 2 * self._pool.size))
        self._tasks: dict[Future[ShardResult], _Task] = {}  # the oldest first
        self._metrics = RunMetrics(config.table.uri)

    def num_unfinished(self) -> int:
        """Return how many shards have no outcome yet."""
        return len(self._queue) + len(self._queue.suspects) + len(self._tasks)

    def step(self) -> list[Outcome]:
        """Hand out shards, wait a moment, and return what has come back.

        Workers have their next shards before the caller spends time on the outcomes.

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
        """Take the workers off the metrics page; Ray ends them with the driver's connection."""
        self._metrics.set_workers(0)

    def _hand_out(self) -> None:
        """Give shards to the workers with fewest; a suspect goes alone when all else is done."""
        for load in range(self._pool.in_flight):
            # More than one shard ahead only while there are plenty: all workers end together.
            spare = len(self._pool.ready) * max(0, load - 1)
            for worker in self._pool.ready:
                if len(worker.tasks) == load and len(self._queue) > spare:
                    self._submit(worker, self._queue.take(worker.path))
        if not self._queue and not self._tasks and self._queue.suspects and self._pool.ready:
            suspect, _ = self._queue.suspects.popleft()
            self._submit(next(iter(self._pool.ready)), suspect)

    def _submit(self, worker: WorkerHandle, shard: Shard) -> None:
        future = call(self._answers, worker.actor.encode, shard)
        self._tasks[future] = _Task(worker, shard, time.monotonic() + self._shard_timeout_s)
        worker.path = shard.path
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

    def _finished(self, future: Future[ShardResult]) -> Sequence[Outcome]:
        task = self._tasks.pop(future)
        task.worker.tasks.remove(future)
        error = future.exception()
        if isinstance(error, RayTaskError):
            return self._queue.failed(task.shard, reason_of(error))
        if isinstance(error, RayError):
            return self._remove_worker(task.worker, [task.shard], reason_of(error))
        result = future.result()
        self._pool.deaths.clear()
        self._metrics.add(result)
        return [result]

    def _remove_worker(
        self, worker: WorkerHandle, lost: list[Shard], reason: str
    ) -> Sequence[Outcome]:
        """Take back the shards of a dead worker: as suspects, unless its node died with it."""
        for future in worker.tasks:
            if not future.done() or future.exception():  # what it finished arrives in a moment
                lost.append(self._tasks.pop(future).shard)
        self._pool.remove(worker, reason)
        if worker.node in self._pool.nodes:
            reason = f"its worker died: {reason}"
            return [f for shard in lost for f in self._queue.failed(shard, reason, worker.node)]
        for shard in lost:
            self._queue.put_back(shard)
        return []

    def _replace_overdue(self) -> Sequence[Outcome]:
        """Replace the worker of the oldest call if that has taken too long."""
        future, task = next(iter(self._tasks.items()), (None, None))
        if not future or not task or future.done() or task.deadline > time.monotonic():
            return []
        return self._remove_worker(
            task.worker, [], f"no result after {self._shard_timeout_s:.0f} s"
        )
