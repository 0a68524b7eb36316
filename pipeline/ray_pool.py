"""The pool of Ray workers, and the loop that hands them shards.

Ray retries nothing here. The loop counts attempts itself (ShardQueue), so that it can name the
shard that fails. Only shards and fragment metadata travel. Workers come and go with the nodes; one
that goes costs at most the shards it had.

No step of the loop grows with the number of shards or of workers: answers arrive in a queue, and
ready workers are kept by how much they have to do.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kalm_encoder.errors import KalmError
from pipeline.driver import Outcome
from pipeline.encode_shard import ShardResult, WorkerConfig
from pipeline.ray_cluster import RayOptions, alive_nodes, worker_shape
from pipeline.ray_metrics import RunMetrics
from pipeline.shard_queue import ShardQueue, short_last
from pipeline.shards import Shard

logger = logging.getLogger(__name__)

IN_FLIGHT = 3
"""Shards a worker has at once: one is read and tokenised, one is on the device, one is written."""
TICK_S = 1.0
LOOK_EVERY_S = 2.0


@dataclass(eq=False)
class _Member:
    """A worker as the driver sees it: Ray places it on a node, it loads, then it is ready."""

    actor: Any
    node: str = ""
    path: str = ""  # of the shard it was given last
    tasks: set[Future[ShardResult]] = field(default_factory=set)


@dataclass(frozen=True)
class _Task:
    member: _Member
    shard: Shard
    deadline: float


class Pool:
    """Workers, and shards under way.

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
        self._options = options
        self._nodes = alive_nodes()
        self._shape = worker_shape(options, self._nodes)
        self._config = config if self._shape.gpus else replace(config, threads=self._shape.cpus)
        self._actor = ray.remote(worker).options(
            num_cpus=self._shape.cpus,
            num_gpus=self._shape.gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=IN_FLIGHT,
        )
        self._metrics = RunMetrics(config.uri)
        self._answers: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self._members: set[_Member] = set()
        self._starting: dict[Future[Any], _Member] = {}
        # Ready workers by how many shards they have; dicts, for their order.
        self._ready: list[dict[_Member, None]] = [{} for _ in range(IN_FLIGHT + 1)]
        self._tasks: dict[Future[ShardResult], _Task] = {}  # the oldest first
        self._deaths: list[str] = []  # their nodes, since the last shard that was encoded
        self._ready_at = self._looked_at = time.monotonic()
        wanted = options.num_workers or self._shape.room(self._nodes)
        self._queue = ShardQueue(*short_last(shards, 2 * wanted))
        self._resize()

    def busy(self) -> bool:
        """Whether any shard is not dealt with yet."""
        return self._num_unfinished() > 0

    def turn(self) -> list[Outcome]:
        """Hand out shards, wait a moment, and return what has come back.

        Workers have their next shards before the caller spends time on the outcomes.

        Raises:
            KalmError: workers cannot start, keep dying, or none became ready in time.
        """
        self._dispatch()
        outcomes: list[Outcome] = []
        for future in self._arrived():
            if future in self._starting:
                self._advance(self._starting.pop(future), future)
            elif future in self._tasks:  # else its worker is gone
                outcomes += self._finished(future)
        outcomes += self._replace_overdue()
        self._look()
        self._dispatch()
        return outcomes

    def _num_unfinished(self) -> int:
        return len(self._queue) + self._queue.num_suspects + len(self._tasks)

    def _num_ready(self) -> int:
        return sum(map(len, self._ready))

    def _dispatch(self) -> None:
        """Fill workers up, the idlest first; a suspect goes alone when all else is done."""
        for load in range(IN_FLIGHT):
            # The last shard ahead only while there is plenty, so that all end together.
            spare = self._num_ready() if load == IN_FLIGHT - 1 else 0
            for member in list(self._ready[load]):
                if len(self._queue) <= spare:
                    break
                self._submit(member, self._queue.take(member.path))
        if not self._queue and not self._tasks and self._queue.num_suspects and self._ready[0]:
            self._submit(next(iter(self._ready[0])), self._queue.take_suspect())

    def _submit(self, member: _Member, shard: Shard) -> None:
        future = self._call(member.actor.encode, shard)
        deadline = time.monotonic() + self._options.shard_timeout_s
        self._tasks[future] = _Task(member, shard, deadline)
        member.path = shard.path
        del self._ready[len(member.tasks)][member]
        member.tasks.add(future)
        self._ready[len(member.tasks)][member] = None

    def _call(self, method: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = method.remote(*arguments).future()
        future.add_done_callback(self._answers.put)
        return future

    def _arrived(self) -> list[Future[Any]]:
        """Wait for an answer, at most a tick, and return all that are there."""
        try:
            arrived = [self._answers.get(timeout=TICK_S)]
        except queue.Empty:
            return []
        while not self._answers.empty():
            arrived.append(self._answers.get())
        return arrived

    def _advance(self, member: _Member, future: Future[Any]) -> None:
        """Go on with a worker that starts, or deal with its failure."""
        error = future.exception()
        if isinstance(error, RayTaskError):
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, KalmError):
                raise cause from None
            raise KalmError(f"a worker cannot start: {_reason(error)}") from error
        if isinstance(error, RayError):
            self._remove(member, f"died while it started: {_reason(error)}")
        elif not member.node:
            member.node = future.result()
            self._starting[self._call(member.actor.load, self._config)] = member
        else:
            future.result()  # raises what is no error of Ray's
            self._ready[0][member] = None
            self._metrics.set_workers(self._num_ready())

    def _finished(self, future: Future[ShardResult]) -> Sequence[Outcome]:
        task = self._tasks.pop(future)
        member, error = task.member, future.exception()
        if member in self._members:
            del self._ready[len(member.tasks)][member]
            member.tasks.remove(future)
            self._ready[len(member.tasks)][member] = None
        if isinstance(error, RayTaskError):
            return self._queue.failed(task.shard, _reason(error))
        if isinstance(error, RayError):
            return self._bury(member, [task.shard], _reason(error))
        result = future.result()
        self._deaths.clear()
        self._metrics.add(result)
        return [result]

    def _bury(self, member: _Member, lost: list[Shard], reason: str) -> list[Outcome]:
        """Take back the shards of a dead worker: suspects, unless it was its node that died."""
        for future in member.tasks:
            if not future.done() or future.exception():  # what it finished arrives in a moment
                lost.append(self._tasks.pop(future).shard)
        self._remove(member, reason)
        if member.node in self._nodes:
            return [f for shard in lost for f in self._queue.suspect(shard, member.node, reason)]
        for shard in lost:
            self._queue.put_back(shard)
        return []

    def _remove(self, member: _Member, reason: str) -> None:
        """Forget a worker, find out whether its node went too, and start another if there is room.

        Raises:
            KalmError: too many died in a row on nodes that live.
        """
        self._drop(member)
        if member.node in self._nodes:
            self._refresh()
        if member.node and member.node not in self._nodes:
            logger.info("a worker went with its node %s", member.node)
        else:
            logger.warning("a worker died: %s", reason)
            self._deaths.append(member.node)
            deaths = sum(not node or node in self._nodes for node in self._deaths)
            if deaths > 2 * len(self._members) + 5:
                raise KalmError(f"workers keep dying, the last because: {reason}")
        self._resize()

    def _drop(self, member: _Member) -> None:
        ray.kill(member.actor)
        self._members.remove(member)
        self._ready[len(member.tasks)].pop(member, None)
        self._metrics.set_workers(self._num_ready())

    def _replace_overdue(self) -> list[Outcome]:
        future, task = next(iter(self._tasks.items()), (None, None))
        if not future or not task or future.done() or task.deadline > time.monotonic():
            return []
        return self._bury(task.member, [], f"no result after {self._options.shard_timeout_s:.0f} s")

    def _look(self) -> None:
        """Every so often look at the cluster.

        Raises:
            KalmError: for too long no worker has been ready.
        """
        now = time.monotonic()
        if self._num_ready():
            self._ready_at = now
        elif now - self._ready_at > self._options.start_timeout_s:
            raise KalmError(
                f"no worker became ready within {self._options.start_timeout_s:.0f} s: see "
                "`ray status` for what the cluster lacks"
            )
        if now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._refresh()
            self._resize()

    def _refresh(self) -> None:
        nodes = alive_nodes()
        if nodes.keys() != self._nodes.keys():
            self._nodes = nodes
            self._queue.pardon(nodes)
            logger.info("%d nodes, with room for %d workers", len(nodes), self._shape.room(nodes))

    def _resize(self) -> None:
        """Start workers that are wanted, and give up those for which there is no place."""
        wanted = self._options.num_workers or self._shape.room(self._nodes)
        wanted = min(wanted, self._num_unfinished())
        for _ in range(wanted - len(self._members)):
            member = _Member(self._actor.remote())
            self._members.add(member)
            self._starting[self._call(member.actor.node)] = member
        waiting = [(f, m) for f, m in self._starting.items() if not m.node]
        for future, member in waiting[: max(0, len(self._members) - wanted)]:
            del self._starting[future]
            self._drop(member)


def _reason(error: BaseException) -> str:
    """Return the one line of a Ray error that says what happened."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else " ".join(lines[:2])
