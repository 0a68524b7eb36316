"""The loop that hands shards to Ray workers.

Ray retries nothing here. The loop counts attempts itself (ShardQueue), so that it can name the
shard that fails. Only shards and fragment metadata travel. A worker that goes costs at most the
shards it had.

What a shard costs here grows neither with the number of shards nor of workers: answers arrive in a
queue, and ready workers are kept by how much they have to do.
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
from pipeline.messages import IN_FLIGHT, Outcome, ShardResult, WorkerConfig
from pipeline.workers.on_ray.cluster import RayOptions
from pipeline.workers.on_ray.members import Answers, WorkerHandle, WorkerPool, call, reason_of
from pipeline.workers.shard_queue import ShardQueue, short_last

TICK_S = 1.0


@dataclass(frozen=True)
class _Task:
    member: WorkerHandle
    shard: Shard
    deadline: float


class Pool:
    """Workers, shards that wait and shards under way.

    Args:
        worker: class of the actors.
        options: what they ask for, and how many.
        config: what each loads.
        shards: to encode, in plan order.

    Raises:
        InputError: no node can hold one worker.
    """

    def __init__(
        self, worker: type, options: RayOptions, config: WorkerConfig, shards: Sequence[Shard]
    ) -> None:
        self._shard_timeout_s = options.shard_timeout_s
        self._answers: Answers = queue.SimpleQueue()
        self._crew = WorkerPool(worker, options, config, self._answers)
        self._queue = ShardQueue(*short_last(shards, 2 * self._crew.size))
        self._tasks: dict[Future[ShardResult], _Task] = {}  # the oldest first

    def busy(self) -> bool:
        """Whether any shard is not dealt with yet."""
        return self._num_unfinished() > 0

    def step(self) -> list[Outcome]:
        """Hand out shards, wait a moment, and return what has come back.

        Workers have their next shards before the caller spends time on the outcomes.

        Raises:
            KalmError: workers cannot start, keep dying, or none became ready in time.
        """
        self._crew.follow(self._num_unfinished())
        self._dispatch()
        outcomes: list[Outcome] = []
        for future in self._arrived():
            if future in self._tasks:
                outcomes += self._finished(future)
            else:
                self._crew.started(future)
        outcomes += self._replace_overdue()
        self._queue.clear_suspects(self._crew.nodes)
        self._dispatch()
        return outcomes

    def close(self) -> None:
        """Note that the run is over; Ray ends the workers with the driver's connection."""
        self._crew.close()

    def _num_unfinished(self) -> int:
        return len(self._queue) + self._queue.num_suspects + len(self._tasks)

    def _dispatch(self) -> None:
        """Fill workers up, the idlest first; a suspect goes alone when all else is done."""
        for load in range(IN_FLIGHT):
            # The last shard ahead only while there is plenty, so that all end together.
            spare = self._crew.num_ready if load == IN_FLIGHT - 1 else 0
            for member in self._crew.ready(load) if len(self._queue) > spare else ():
                if len(self._queue) > spare:
                    self._submit(member, self._queue.take(member.path))
        if not self._queue and not self._tasks and self._queue.num_suspects:
            for member in self._crew.ready(0)[:1]:
                self._submit(member, self._queue.take_suspect())

    def _submit(self, member: WorkerHandle, shard: Shard) -> None:
        future = call(self._answers, member.actor.encode, shard)
        self._tasks[future] = _Task(member, shard, time.monotonic() + self._shard_timeout_s)
        member.path = shard.path
        self._crew.begin(member, future)

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
        self._crew.end(task.member, future)
        error = future.exception()
        if isinstance(error, RayTaskError):
            return self._queue.failed(task.shard, reason_of(error))
        if isinstance(error, RayError):
            return self._remove_worker(task.member, [task.shard], reason_of(error))
        result = future.result()
        self._crew.succeeded(result)
        return [result]

    def _remove_worker(
        self, member: WorkerHandle, lost: list[Shard], reason: str
    ) -> Sequence[Outcome]:
        """Take back the shards of a dead worker: suspects, unless it was its node that died."""
        for future in member.tasks:
            if not future.done() or future.exception():  # what it finished arrives in a moment
                lost.append(self._tasks.pop(future).shard)
        self._crew.remove(member, reason)
        if member.node in self._crew.nodes:
            return [f for shard in lost for f in self._queue.suspect(shard, member.node, reason)]
        for shard in lost:
            self._queue.put_back(shard)
        return []

    def _replace_overdue(self) -> Sequence[Outcome]:
        """Replace the worker of the oldest call if that has taken too long."""
        future, task = next(iter(self._tasks.items()), (None, None))
        if not future or not task or future.done() or task.deadline > time.monotonic():
            return []
        return self._remove_worker(
            task.member, [], f"no result after {self._shard_timeout_s:.0f} s"
        )
