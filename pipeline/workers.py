"""The Ray side: worker actors, and the loop that hands them shards.

With ray_cluster the only module that knows Ray.

Ray retries nothing here. The loop counts attempts itself, so that it can name the shard that fails:
a shard that raises is tried again, at the end; the shards of a worker that died are tried last and
one at a time, so that none is blamed for its neighbour. Only shards and fragment metadata travel.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kalm_encoder.errors import KalmError
from pipeline.driver import Executor, Outcome, ShardFailure
from pipeline.encode_shard import IN_FLIGHT, ShardEncoder, ShardResult, WorkerConfig
from pipeline.ray_cluster import RayOptions, connect, worker_shape
from pipeline.shards import Shard

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
TICK_S = 1.0


class Worker:
    """Actor: a ShardEncoder that is loaded by a call, so that a failure has its own message."""

    def __init__(self) -> None:
        self._encoder: ShardEncoder | None = None

    def load(self, config: WorkerConfig) -> None:
        """Load model and table; on a GPU if Ray gave this actor one."""
        self._encoder = ShardEncoder(config, device="cuda" if ray.get_gpu_ids() else "cpu")

    def encode(self, shard: Shard) -> ShardResult:
        """Encode one shard; up to IN_FLIGHT calls run at once."""
        if self._encoder is None:
            raise KalmError("the worker was asked to encode before it was loaded")
        return self._encoder.encode(shard)


def on_ray(options: RayOptions) -> Executor:
    """Return the executor that encodes shards on Ray actors."""
    return partial(_encode_on_ray, options)


def _encode_on_ray(
    options: RayOptions, config: WorkerConfig, shards: Sequence[Shard]
) -> Generator[Outcome]:
    if not shards:
        return
    with tempfile.TemporaryDirectory() as folder:
        connect(options, Path(folder))
    try:
        pool = _Pool(options, config, shards)
        while pool.busy():
            pool.dispatch()
            yield from pool.collect()
    finally:
        ray.shutdown()


@dataclass
class _Task:
    actor: Any
    shard: Shard
    deadline: float


class _Pool:
    """Workers, shards waiting and shards under way."""

    def __init__(self, options: RayOptions, config: WorkerConfig, shards: Sequence[Shard]) -> None:
        self._options = options
        count, cpus, gpus = worker_shape(options, len(shards))
        self._config = config if gpus else replace(config, threads=cpus)
        self._actor = ray.remote(Worker).options(
            num_cpus=cpus,
            num_gpus=gpus,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=IN_FLIGHT,
        )
        self._queue = deque(shards)
        self._suspects: deque[Shard] = deque()
        self._attempts: dict[int, int] = {}
        self._loading: dict[Any, Any] = {}
        self._ready: list[Any] = []
        self._tasks: dict[Any, _Task] = {}
        self._deaths = 0  # since the last shard that was encoded
        self._most_deaths = 2 * count + 3
        self._started = time.monotonic()
        for _ in range(count):
            self._start_worker()

    def busy(self) -> bool:
        """Whether any shard is not dealt with yet."""
        return bool(self._queue or self._suspects or self._tasks)

    def dispatch(self) -> None:
        """Give each ready worker its next shards; a suspect goes alone when all else is done."""
        for actor in self._ready:
            load = sum(task.actor is actor for task in self._tasks.values())
            for _ in range(min(IN_FLIGHT - load, len(self._queue))):
                self._submit(actor, self._queue.popleft())
        if not self._queue and not self._tasks and self._suspects and self._ready:
            self._submit(self._ready[0], self._suspects.popleft())

    def collect(self) -> Generator[Outcome]:
        """Wait a moment and yield what has come back, or a tick."""
        refs = [*self._loading, *self._tasks]
        done, _ = ray.wait(refs, num_returns=1, timeout=TICK_S) if refs else ([], None)
        for ref in done:
            if ref in self._loading:
                self._loaded(ref)
            else:
                yield from self._finished(ref)
        if not done:
            yield None
        yield from self._replace_overdue()
        if not self._ready and time.monotonic() - self._started > self._options.start_timeout_s:
            raise KalmError(
                f"no worker became ready within {self._options.start_timeout_s:.0f} s: see "
                "`ray status` for what the cluster lacks"
            )

    def _submit(self, actor: Any, shard: Shard) -> None:
        deadline = time.monotonic() + self._options.shard_timeout_s
        self._tasks[actor.encode.remote(shard)] = _Task(actor, shard, deadline)

    def _start_worker(self) -> None:
        actor = self._actor.remote()
        self._loading[actor.load.remote(self._config)] = actor

    def _loaded(self, ref: Any) -> None:
        actor = self._loading.pop(ref)
        try:
            ray.get(ref)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if isinstance(cause, KalmError):
                raise cause from None
            raise KalmError(f"a worker cannot start: {_reason(error)}") from error
        except RayError as error:
            self._replace_worker(f"died while it started: {_reason(error)}")
        else:
            self._ready.append(actor)
            self._started = time.monotonic()

    def _finished(self, ref: Any) -> Generator[Outcome]:
        if ref not in self._tasks:
            return
        task = self._tasks.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            yield from self._retry(task.shard, self._queue, _reason(error))
        except RayError as error:
            yield from self._bury(task, _reason(error))
        else:
            self._deaths = 0
            yield result

    def _bury(self, task: _Task, reason: str) -> Generator[Outcome]:
        """Deal with a dead worker: its shards become suspects, another takes its place."""
        lost = [task.shard]
        for ref in [r for r, t in self._tasks.items() if t.actor is task.actor]:
            lost.append(self._tasks.pop(ref).shard)
        self._ready = [actor for actor in self._ready if actor is not task.actor]
        self._replace_worker(reason)
        for shard in lost:
            yield from self._retry(shard, self._suspects, f"its worker died: {reason}")

    def _retry(self, shard: Shard, queue: deque[Shard], reason: str) -> Generator[Outcome]:
        attempts = self._attempts.get(shard.number, 0) + 1
        self._attempts[shard.number] = attempts
        if attempts >= MAX_ATTEMPTS:
            yield ShardFailure(shard, attempts, reason)
        else:
            logger.warning("shard %s failed (attempt %d): %s", shard.id, attempts, reason)
            queue.append(shard)

    def _replace_worker(self, reason: str) -> None:
        logger.warning("a worker died: %s", reason)
        self._deaths += 1
        if self._deaths > self._most_deaths:
            raise KalmError(f"workers keep dying, the last because: {reason}")
        self._start_worker()

    def _replace_overdue(self) -> Generator[Outcome]:
        now = time.monotonic()
        for task in [t for t in self._tasks.values() if t.deadline < now]:
            refs = [r for r, t in self._tasks.items() if t is task]
            if refs:  # not already buried with another shard of the same worker
                self._tasks.pop(refs[0])
                ray.kill(task.actor)
                seconds = self._options.shard_timeout_s
                yield from self._bury(task, f"no result after {seconds:.0f} s")


def _reason(error: BaseException) -> str:
    """Return the one line of a Ray error that says what happened."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else " ".join(lines[:2])
