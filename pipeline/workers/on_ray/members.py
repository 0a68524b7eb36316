"""The workers of a run: Ray actors that come and go with the nodes of the cluster."""

from __future__ import annotations

import logging
import queue
import time
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kalm_encoder.errors import KalmError
from pipeline.messages import IN_FLIGHT, ShardResult, WorkerConfig
from pipeline.workers.on_ray.cluster import RayOptions, alive_nodes, worker_shape
from pipeline.workers.on_ray.metrics import RunMetrics

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0

Answers = queue.SimpleQueue[Future[Any]]
"""Calls that have come back, in the order they did."""


def call(answers: Answers, method: Any, *arguments: Any) -> Future[Any]:
    """Call a method of an actor; its future arrives in `answers`, which no one has to search."""
    future: Future[Any] = method.remote(*arguments).future()
    future.add_done_callback(answers.put)
    return future


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver sees it: Ray places it on a node, it loads, then it is ready.

    Attributes:
        actor: its Ray handle.
        node: id of its node; "" until it is placed.
        path: file of the shard it was given last.
        tasks: calls of `encode` under way.
    """

    actor: Any
    node: str = ""
    path: str = ""
    tasks: set[Future[ShardResult]] = field(default_factory=set)


class WorkerPool:
    """All workers of a run.

    Without a number of workers asked for there are as many as the nodes hold: more when one joins,
    fewer when one leaves. With one, so many are requested, and start as there comes to be room.

    Args:
        worker: class of the actors.
        options: what they ask for, and how many.
        config: what each loads.
        answers: where their calls come back.

    Attributes:
        nodes: that were alive at the last look.
        members: all workers, ready or not.

    Raises:
        InputError: no node can hold one worker.
    """

    def __init__(
        self, worker: type, options: RayOptions, config: WorkerConfig, answers: Answers
    ) -> None:
        self._options, self._answers = options, answers
        self.nodes = alive_nodes()
        self._shape = worker_shape(options, self.nodes)
        self._room = self._shape.room(self.nodes)
        self._config = config if self._shape.gpus else replace(config, threads=self._shape.cpus)
        self._actor = ray.remote(worker).options(
            num_cpus=self._shape.cpus,
            num_gpus=self._shape.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=IN_FLIGHT,
        )
        self.members: set[WorkerHandle] = set()
        self._starting: dict[Future[Any], WorkerHandle] = {}
        # Those that are ready, by how many shards they have; dicts, for their order.
        self._ready: list[dict[WorkerHandle, None]] = [{} for _ in range(IN_FLIGHT + 1)]
        self._deaths: list[str] = []  # nodes of the dead, since a worker was last seen to work
        self._ready_at = self._looked_at = time.monotonic()
        self._metrics = RunMetrics(config.uri)

    @property
    def size(self) -> int:
        """How many workers are wanted, were there shards for all."""
        return self._options.num_workers or self._room

    @property
    def num_ready(self) -> int:
        """How many are loaded."""
        return sum(map(len, self._ready))

    def ready(self, load: int) -> list[WorkerHandle]:
        """Return those that have `load` shards."""
        return list(self._ready[load])

    def begin(self, member: WorkerHandle, future: Future[ShardResult]) -> None:
        """Note a shard that a worker was given."""
        del self._ready[len(member.tasks)][member]
        member.tasks.add(future)
        self._ready[len(member.tasks)][member] = None

    def end(self, member: WorkerHandle, future: Future[ShardResult]) -> None:
        """Note that a worker, if it is still there, is done with a shard."""
        if member in self.members:
            del self._ready[len(member.tasks)][member]
            member.tasks.remove(future)
            self._ready[len(member.tasks)][member] = None

    def succeeded(self, result: ShardResult) -> None:
        """Note that workers can work."""
        self._deaths.clear()
        self._metrics.add(result)

    def started(self, future: Future[Any]) -> None:
        """Go on with a worker that starts; a call of one that is gone is nothing.

        Raises:
            KalmError: it cannot start, or workers keep dying.
        """
        member = self._starting.pop(future, None)
        if member is None:
            return
        error = future.exception()
        if isinstance(error, RayTaskError):
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, KalmError):
                raise cause from None
            raise KalmError(f"a worker cannot start: {reason_of(error)}") from error
        if isinstance(error, RayError):
            self.remove(member, f"died while it started: {reason_of(error)}")
        elif member.node:
            future.result()  # raises what is no error of Ray's
            self._ready[0][member] = None
            self._metrics.set_workers(self.num_ready)
        else:
            member.node = future.result()
            self._starting[call(self._answers, member.actor.load, self._config)] = member

    def remove(self, member: WorkerHandle, reason: str) -> None:
        """Forget a dead worker, and find out whether its node is gone too.

        Raises:
            KalmError: too many died in a row on nodes that live.
        """
        self._drop(member)
        if member.node in self.nodes:
            self._refresh()
        if member.node and member.node not in self.nodes:
            logger.info("a worker went with its node %s", member.node)
            return
        logger.warning("a worker died: %s", reason)
        self._deaths.append(member.node)
        deaths = sum(not node or node in self.nodes for node in self._deaths)
        if deaths > 2 * len(self.members) + 5:
            raise KalmError(f"workers keep dying, the last because: {reason}")

    def follow(self, num_shards: int) -> None:
        """Look at the cluster every so often; start workers, or give up those without a place.

        Args:
            num_shards: not finished; more workers are not needed.

        Raises:
            KalmError: for too long no worker has been ready.
        """
        now = time.monotonic()
        if self.num_ready:
            self._ready_at = now
        elif now - self._ready_at > self._options.start_timeout_s:
            raise KalmError(
                f"no worker became ready within {self._options.start_timeout_s:.0f} s: see "
                "`ray status` for what the cluster lacks"
            )
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._refresh()
        wanted = min(self.size, num_shards)
        for _ in range(wanted - len(self.members)):
            member = WorkerHandle(self._actor.remote())
            self.members.add(member)
            self._starting[call(self._answers, member.actor.node)] = member
        if len(self.members) > wanted:
            waiting = [(f, m) for f, m in self._starting.items() if not m.node]
            for future, member in waiting[: len(self.members) - wanted]:
                del self._starting[future]
                self._drop(member)

    def close(self) -> None:
        """Leave no workers on the metrics page that are not there."""
        self._metrics.set_workers(0)

    def _drop(self, member: WorkerHandle) -> None:
        ray.kill(member.actor)
        self.members.remove(member)
        self._ready[len(member.tasks)].pop(member, None)
        self._metrics.set_workers(self.num_ready)

    def _refresh(self) -> None:
        nodes = alive_nodes()
        if nodes.keys() != self.nodes.keys():
            self.nodes, self._room = nodes, self._shape.room(nodes)
            logger.info("%d nodes, with room for %d workers", len(nodes), self._room)


def reason_of(error: BaseException) -> str:
    """Return the one line of a Ray error that says what happened."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else " ".join(lines[:2])
