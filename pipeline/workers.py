"""The Ray side: worker actors, and the loop that hands them shards. The only module that knows Ray.

Ray retries nothing here. The loop counts attempts itself, so that it can name the shard that fails:
a shard that raises is tried again, at the end; the shards of a worker that died are tried last and
one at a time, so that none is blamed for its neighbour. Only shards and fragment metadata travel.
"""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import socket
import time
import warnings
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from kalm_encoder.errors import InputError, KalmError
from pipeline.driver import Executor, Outcome, ShardFailure
from pipeline.encode_shard import ShardEncoder, ShardResult, WorkerConfig
from pipeline.shards import Shard

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
IN_FLIGHT = 2
"""Shards a worker has at once: while one is on the device the other is read or written."""
TICK_S = 1.0
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RayOptions:
    """Where and on what to run.

    Attributes:
        address: of a cluster; None takes RAY_ADDRESS, else starts a cluster on this machine.
        num_workers: None takes one a GPU, or where there is none as many as the CPUs hold.
        cpus_per_worker: threads of a CPU worker; None takes half the machine's, 1 to 4.
        shard_timeout_s: a worker that takes longer for one shard is replaced.
        start_timeout_s: how long no worker at all may become ready.
    """

    address: str | None = None
    num_workers: int | None = None
    cpus_per_worker: int | None = None
    shard_timeout_s: float = 3600.0
    start_timeout_s: float = 600.0


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
    _connect(options)
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
        count, cpus, gpus = _worker_shape(options, len(shards))
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


def _connect(options: RayOptions) -> None:
    """Join the cluster asked for, or start one on this machine."""
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # Without one Ray writes a token into the home folder, which may be read-only.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # A `pipeline` folder in the user's working directory would shadow ours inside the workers.
    packages = [
        str(Path(str(importlib.import_module(name).__file__)).parent)
        for name in ("kalm_encoder", "pipeline")
    ]
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        # Ray itself tries for over five minutes before it says that nothing is there.
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise InputError(f"no Ray cluster answers at {address}: {error}") from error
    extra = {"object_store_memory": 100_000_000} if address == "local" else {}
    try:
        with warnings.catch_warnings():
            # Ray forks and at once executes its daemons: Lance's threads are not used in between.
            warnings.filterwarnings("ignore", message="lance is not fork-safe")
            ray.init(
                address=address,
                runtime_env={"py_modules": packages},
                include_dashboard=False if address == "local" else None,
                logging_level=logging.WARNING,
                **extra,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot join Ray at {address!r}: {error}") from error


def _worker_shape(options: RayOptions, num_shards: int) -> tuple[int, int, int]:
    """Return (workers, CPUs each, GPUs each).

    Raises:
        InputError: no node of the cluster can hold one worker.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = int(sum(node.get("GPU", 0) for node in nodes))
    most_cpus = int(max(node.get("CPU", 0) for node in nodes))
    if gpus:
        cpus, per_worker, room = options.cpus_per_worker or 1, 1, gpus
    else:
        cpus, per_worker = options.cpus_per_worker or max(1, min(4, most_cpus // 2)), 0
        room = int(sum(node.get("CPU", 0) // cpus for node in nodes))
    if cpus > most_cpus or room == 0:
        raise InputError(
            f"no node can hold a worker of {cpus} CPUs and {per_worker} GPUs; the largest has "
            f"{most_cpus} CPUs. Lower --cpus-per-worker"
        )
    return min(options.num_workers or room, num_shards), cpus, per_worker


def _reason(error: BaseException) -> str:
    """Return the one line of a Ray error that says what happened."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {cause}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if isinstance(error, RayTaskError) else " ".join(lines[:2])
