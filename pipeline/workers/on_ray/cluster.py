"""Joining or starting a Ray cluster, and what one worker may ask of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from kalm_encoder.errors import InputError
from pipeline import logs

CONNECT_TIMEOUT_S = 10.0
MOST_CPUS = 4
"""A worker asks for no more unless told to: beyond it more workers do better than more threads.
Beside a GPU they read, tokenise and write; one CPU alone would leave the GPU waiting."""


@dataclass(frozen=True)
class RayOptions:
    """Where and on what to run.

    Attributes:
        address: of a cluster; None takes RAY_ADDRESS, else starts a cluster on this machine.
        num_workers: None takes as many as there is room for, at any time: nodes may join and leave.
        cpus_per_worker: threads of a CPU worker; None takes up to 4. Beside a GPU, those that read,
            tokenise and write; None takes a GPU's share of its node's, up to 4.
        gpus_per_worker: may be a fraction; None takes 1 where there is any GPU, 0 uses CPUs alone.
        shard_timeout_s: a worker that takes longer for one shard is replaced.
        start_timeout_s: how long no worker at all may become ready.
    """

    address: str | None = None
    num_workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    shard_timeout_s: float = 3600.0
    start_timeout_s: float = 600.0


def connect(
    options: RayOptions, folder: Path, *, packages: Sequence[str] = ("kalm_encoder", "pipeline")
) -> None:
    """Join the cluster asked for, or start one on this machine.

    Our packages travel with the job, through `folder`. Ray puts the driver's working directory
    first on its workers' path, where a user's own `pipeline` folder would shadow ours (py_modules
    come after it); a working_dir of our own takes that place. A job from `ray job submit` may have
    a working_dir already and cannot have a second one.

    Raises:
        InputError: no cluster there.
    """
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # Without one Ray writes a token into the home folder, which may be read-only.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        # Ray itself tries for over five minutes before it says that nothing is there.
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise InputError(f"no Ray cluster answers at {address}: {error}") from error
    extra = {"object_store_memory": 100_000_000} if address == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings(), _own_handlers():
            # Ray forks and at once executes its daemons: Lance's threads are not used in between.
            warnings.filterwarnings("ignore", message="lance is not fork-safe")
            ray.init(
                address=address,
                runtime_env=_runtime_env(folder, packages),
                include_dashboard=False if address == "local" else None,
                logging_level=logging.WARNING,
                # Until a worker is loaded. With it Ray puts no prefix before the lines of workers.
                logging_config=ray.LoggingConfig(logs.current().format.upper(), "ERROR"),
                **extra,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot join Ray at {address!r}: {error}") from error
    finally:
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            # Ray puts a handler of its own in its place, with which SIGTERM aborts the process.
            signal.signal(signal.SIGTERM, on_sigterm)


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Undo what Ray does to the logging of this process: lines would come twice."""
    root, ours = logging.getLogger(), logging.getLogger("ray")
    handlers, level, ray_level = root.handlers[:], root.level, ours.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
        ours.handlers.clear()
        ours.propagate = True
        ours.setLevel(ray_level)


Nodes = dict[str, dict[str, float]]
"""Resources of each node that is alive, by its id."""


@dataclass(frozen=True)
class WorkerShape:
    """What one worker asks of its node."""

    cpus: int
    gpus: float

    def room(self, nodes: Nodes) -> int:
        """Return how many workers these nodes hold, were nothing else on them."""
        return sum(self._room_on(resources) for resources in nodes.values())

    def _room_on(self, resources: dict[str, float]) -> int:
        by_cpu = int(resources.get("CPU", 0) // self.cpus)
        return min(by_cpu, gpu_places(resources, self.gpus)) if self.gpus else by_cpu


def gpu_places(resources: dict[str, float], gpus: float) -> int:
    """Return how many workers of `gpus` GPUs a node holds; a share is of one GPU, never of two."""
    present = int(resources.get("GPU", 0))
    return present * int(1 / gpus + 1e-6) if gpus < 1 else int(present // gpus)


def alive_nodes() -> Nodes:
    """Ask the cluster which nodes it has; under a millisecond for a few nodes."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def worker_shape(options: RayOptions, nodes: Nodes) -> WorkerShape:
    """Choose what a worker asks for.

    Raises:
        InputError: no node of the cluster can hold one worker, or no worker can be asked for so.
    """
    if options.num_workers is not None and options.num_workers < 1:
        raise InputError(f"--workers {options.num_workers} must be at least 1 on Ray")
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes.values()))
    gpus = options.gpus_per_worker
    gpus = min(1.0, num_gpus) if gpus is None else gpus
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise InputError(f"--gpus-per-worker {gpus:g}: give a share of one GPU or a whole number")
    cpus = options.cpus_per_worker
    cpus = _default_cpus(nodes, gpus) if cpus is None else cpus
    if cpus < 1:
        raise InputError(f"--cpus-per-worker {cpus} must be at least 1")
    shape = WorkerShape(cpus, gpus)
    if not shape.room(nodes):
        kinds = Counter((n.get("CPU", 0), n.get("GPU", 0)) for n in nodes.values())
        has = ", ".join(f"{count} of {c:g} CPUs and {g:g} GPUs" for (c, g), count in kinds.items())
        raise InputError(
            f"no node can hold a worker of {cpus} CPUs and {gpus:g} GPUs; the nodes are {has}. "
            "Lower --cpus-per-worker or --gpus-per-worker"
        )
    return shape


def _default_cpus(nodes: Nodes, gpus: float) -> int:
    """Return the CPUs of the smallest fair share of a node, or of the largest node without GPUs."""
    cpus = [node.get("CPU", 0) for node in nodes.values()]
    if gpus:
        places = [gpu_places(node, gpus) for node in nodes.values()]
        share = min((c // n for c, n in zip(cpus, places, strict=True) if n), default=0)
    else:
        share = max(cpus, default=0)
    return int(max(1, min(MOST_CPUS, share)))


def _runtime_env(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Copy our packages into `folder` and say how they reach the workers."""
    packages = []
    for name in names:
        source = Path(str(importlib.import_module(name).__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        packages.append(str(shutil.copytree(source, folder / name, ignore=ignored)))
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return {"py_modules": packages} if submitted else {"working_dir": str(folder)}
