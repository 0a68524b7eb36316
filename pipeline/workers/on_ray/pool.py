"""Which workers exist: Ray actors that come and go with the nodes of the cluster.

Does not know units: the dispatcher decides which worker gets which.
"""

from __future__ import annotations

import logging
import queue
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kalm_encoder.errors import KalmError
from pipeline.messages import Work
from pipeline.workers.on_ray.cluster import RayOptions, alive_nodes, worker_resources

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
"""Time between two looks at the nodes of the cluster; a new node waits at most that long."""

Answers = queue.SimpleQueue[Future[Any]]
"""Calls of actors that have come back, in that order."""


def call(answers: Answers, method: Any, *arguments: Any) -> Future[Any]:
    """Call a method of an actor; its future arrives in `answers`, where nobody searches for it."""
    future: Future[Any] = method.remote(*arguments).future()
    future.add_done_callback(answers.put)
    return future


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver sees it: Ray places it on a node, it loads, then it is ready.

    Attributes:
        actor: Ray handle of the actor.
        node: Id of its node; "" until it is placed.
        path: Path of the unit that it was given last.
        tasks: Calls of `do` under way.
    """

    actor: Any
    node: str = ""
    path: str = ""
    tasks: set[Future[Any]] = field(default_factory=set)


class WorkerPool:
    """All workers of a run.

    If no number of workers was asked for there are as many as the nodes hold: more when a node
    joins, fewer when one leaves. Otherwise that many are requested, and start as soon as there is
    room.

    Args:
        worker: Class of the actors.
        options: What the workers ask for, and how many there are.
        work: What each worker loads.
        answers: Where the answers to calls arrive.

    Attributes:
        nodes: Nodes that were alive at the last look.
        workers: All workers, ready or not.
        ready: The workers that are loaded.
        deaths: Nodes of the workers that died. Clear it when a unit is done: workers can work.

    Raises:
        InputError: If no node can hold one worker.
    """

    def __init__(self, worker: type, options: RayOptions, work: Work, answers: Answers) -> None:
        self._options, self._work, self._answers = options, work, answers
        self.nodes = alive_nodes()
        self._resources = worker_resources(options, self.nodes, loads_model=work.loads_model)
        self._actor = ray.remote(worker).options(
            num_cpus=self._resources.cpus,
            num_gpus=self._resources.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=self._resources.in_flight,
        )
        self.workers: set[WorkerHandle] = set()
        self._starting: dict[Future[Any], WorkerHandle] = {}
        self.ready: set[WorkerHandle] = set()
        self.deaths: list[str] = []
        self._ready_at = self._looked_at = time.monotonic()

    @property
    def in_flight(self) -> int:
        """Number of units that each worker has at once."""
        return self._resources.in_flight

    @property
    def size(self) -> int:
        """Number of workers that are wanted if there are units for all."""
        return self._options.num_workers or self._resources.room(self.nodes)

    def adjust(self, num_units: int) -> None:
        """Start workers that are wanted, and give up those without a node that no longer are.

        Args:
            num_units: Number of unfinished units; more workers are not needed.

        Raises:
            KalmError: If no worker has been ready for too long.
        """
        now = time.monotonic()
        if self.ready:
            self._ready_at = now
        elif now - self._ready_at > self._options.start_timeout_s:
            raise KalmError(
                f"no worker became ready within {self._options.start_timeout_s:.0f} s: see "
                "`ray status` for what the cluster lacks"
            )
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._look()
        surplus = len(self.workers) - min(self.size, num_units)
        for _ in range(-surplus):
            worker = WorkerHandle(self._actor.remote())
            self.workers.add(worker)
            self._starting[call(self._answers, worker.actor.node)] = worker
        if surplus > 0:
            waiting = [(f, worker) for f, worker in self._starting.items() if not worker.node]
            for future, worker in waiting[:surplus]:
                del self._starting[future]
                self._drop(worker)

    def started(self, future: Future[Any]) -> None:
        """Take the next step of a worker that starts, after one of its calls came back.

        Raises:
            KalmError: If it cannot start, or if workers keep dying.
        """
        worker = self._starting.pop(future, None)
        if worker is None:  # it is gone
            return
        error = future.exception()
        if isinstance(error, RayTaskError):
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, KalmError):
                raise cause from None
            raise KalmError(f"a worker cannot start: {reason_of(error)}") from error
        if isinstance(error, RayError):
            self.remove(worker, f"died while it started: {reason_of(error)}")
            return
        answer = future.result()  # raises an error that is not Ray's
        if worker.node:
            self.ready.add(worker)
        else:
            worker.node = answer
            self._starting[call(self._answers, worker.actor.load, self._work)] = worker

    def remove(self, worker: WorkerHandle, reason: str) -> None:
        """Forget a dead worker, and find out whether its node is gone too.

        Raises:
            KalmError: If too many died in a row on living nodes.
        """
        self._drop(worker)
        if worker.node in self.nodes:
            self._look()
        if worker.node and worker.node not in self.nodes:
            logger.info("a worker was lost with its node %s", worker.node)
            return
        logger.warning("a worker died: %s", reason)
        self.deaths.append(worker.node)
        deaths = sum(not node or node in self.nodes for node in self.deaths)
        if deaths > 2 * len(self.workers) + 5:
            raise KalmError(f"workers keep dying, the last because: {reason}")

    def close(self) -> None:
        """End all workers, so that what they held is free for the next step."""
        for worker in list(self.workers):
            self._drop(worker)

    def _drop(self, worker: WorkerHandle) -> None:
        ray.kill(worker.actor)
        self.workers.remove(worker)
        self.ready.discard(worker)

    def _look(self) -> None:
        nodes = alive_nodes()
        if nodes.keys() != self.nodes.keys():
            self.nodes = nodes
            room = self._resources.room(nodes)
            logger.info("%d nodes, with room for %d workers", len(nodes), room)


def reason_of(error: BaseException) -> str:
    """Return the one line of a Ray error that says what happened."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else " ".join(lines[:2])
