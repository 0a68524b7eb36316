"""Joining or starting a Ray cluster, and what one worker may ask of it."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from kalm_encoder.errors import InputError
from pipeline import logs
from pipeline.messages import STEP_IN_FLIGHT, shards_in_flight

CONNECT_TIMEOUT_S = 10.0
"""How long a cluster may take to accept a connection before it counts as absent."""
MOST_CPUS = 4
"""A CPU worker asks for no more unless it is told to: more workers do better than more threads."""
MOST_CPUS_PER_GPU = 16
"""A whole GPU asks for no more. Its CPUs read, tokenise and write: with the smallest model an H100
encodes 600,000 tokens per second and more, and a CPU feeds it 150,000 to 300,000."""


@dataclass(frozen=True)
class RayOptions:
    """The settings that say where and on what to run.

    Attributes:
        address: Address of a cluster. None takes RAY_ADDRESS, else starts one on this machine.
        num_workers: Number of workers. None takes as many as there is room for at any time: nodes
            may join and leave.
        cpus_per_worker: Threads of a CPU worker, or those that read, tokenise and write beside a
            GPU. None takes up to 4 for a CPU worker, and up to 16 for a whole GPU, at most its
            share of the CPUs of its node.
        gpus_per_worker: GPUs per worker, from 0 (CPUs alone) to 1. None takes 1 if there is any.
        unit_timeout_s: Time after which a worker that has not finished a unit is replaced.
        start_timeout_s: Time after which the run ends if no worker at all has become ready.
        waits_for_nodes: Whether workers without a model wait for a node that can hold one. If not,
            a cluster without one is an error.
    """

    address: str | None = None
    num_workers: int | None = None
    cpus_per_worker: int | None = None
    gpus_per_worker: float | None = None
    unit_timeout_s: float = 3600.0
    start_timeout_s: float = 600.0
    waits_for_nodes: bool = False


def connect(
    options: RayOptions,
    folder: Path,
    *,
    packages: Sequence[str] = ("kalm_encoder", "pipeline"),
    env_vars: Mapping[str, str] | None = None,
) -> None:
    """Join the cluster asked for, or start one on this machine.

    Our packages travel with the job, through `folder`. Ray puts the driver's working directory
    first on its workers' path, where a user's own `pipeline` folder would shadow ours (py_modules
    come after it); a working_dir of our own takes that place. A job from `ray job submit` may have
    a working_dir already and cannot have a second one.

    Raises:
        InputError: If no cluster answers there.
    """
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        # Without one Ray writes a token into the home folder, which may be read-only.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit() and "/" not in host:
        # Ray itself would try for over five minutes before it says that nothing is there.
        try:
            socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise InputError(f"no Ray cluster answers at {address}: {error}") from error
    extra = {"object_store_memory": 100_000_000} if address == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    root, of_ray = logging.getLogger(), logging.getLogger("ray")
    handlers, level, ray_level = root.handlers[:], root.level, of_ray.level
    try:
        with warnings.catch_warnings():
            # Ray forks and executes its daemons at once: Lance's threads are not used in between.
            warnings.filterwarnings("ignore", message="lance is not fork-safe")
            ray.init(
                address=address,
                runtime_env=_runtime_env(folder, packages, env_vars),
                include_dashboard=False if address == "local" else None,
                logging_level=logging.WARNING,
                # For workers until they are loaded. With it Ray puts no prefix before their lines.
                logging_config=ray.LoggingConfig(logs.current().format.upper(), "ERROR"),
                **extra,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot join Ray at {address!r}: {_explain(error)}") from error
    finally:
        # Undo what Ray does to the logging of this process; each line would appear twice.
        root.handlers[:] = handlers
        root.setLevel(level)
        of_ray.handlers.clear()
        of_ray.propagate = True
        of_ray.setLevel(ray_level)
        if on_sigterm is not None and threading.current_thread() is threading.main_thread():
            # Ray puts its own handler in its place, with which SIGTERM aborts the process.
            signal.signal(signal.SIGTERM, on_sigterm)


def _explain(error: Exception) -> str:
    """Return what Ray says, with the remedy where its sockets lie too deep."""
    if "AF_UNIX" not in str(error):
        return str(error)
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    return (
        f"the path of a socket may have 107 bytes, and Ray makes its own below {variable} "
        f"({os.environ.get(variable)}): set RAY_TMPDIR to a shorter folder, such as "
        f"RAY_TMPDIR=/tmp ({error})"
    )


Nodes = dict[str, dict[str, float]]
"""Resources of each living node, by its id."""


@dataclass(frozen=True)
class WorkerResources:
    """The resources that one worker asks of its node."""

    cpus: int
    gpus: float
    loads_model: bool = True

    @property
    def in_flight(self) -> int:
        """Number of units that the worker has at once."""
        if not self.loads_model:
            return STEP_IN_FLIGHT
        return shards_in_flight(self.cpus, on_gpu=self.gpus > 0)

    def room(self, nodes: Nodes) -> int:
        """Return how many workers these nodes hold if nothing else is on them."""
        return sum(
            min(int(node.get("CPU", 0) // self.cpus), _gpu_places(node, self.gpus))
            for node in nodes.values()
        )


def _gpu_places(node: dict[str, float], gpus: float) -> int:
    """Return how many workers find their GPU on a node; none of them lies across two GPUs."""
    return int(node.get("GPU", 0)) * int(1 / gpus + 1e-6) if gpus else sys.maxsize


def alive_nodes() -> Nodes:
    """Ask the cluster for its living nodes; this takes under a millisecond for a few nodes."""
    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def worker_resources(
    options: RayOptions, nodes: Nodes, *, loads_model: bool = True
) -> WorkerResources:
    """Choose what a worker asks for. One that loads no model asks for no GPU and for one CPU.

    Raises:
        InputError: If an option makes no sense, or no node of the cluster can hold one worker.
    """
    if options.num_workers is not None and options.num_workers < 1:
        raise InputError(f"--workers {options.num_workers} must be at least 1 on Ray")
    gpus = options.gpus_per_worker if loads_model else 0.0
    if gpus is None:
        gpus = float(any(node.get("GPU", 0) >= 1 for node in nodes.values()))
    if not 0 <= gpus <= 1:
        raise InputError(
            f"--gpus-per-worker {gpus:g} must be between 0 and 1: a worker runs on one GPU, and "
            "more workers use more GPUs"
        )
    cpus = options.cpus_per_worker
    if cpus is None:
        cpus = _default_cpus(nodes, gpus) if loads_model else 1
    if cpus < 1:
        raise InputError(f"--cpus-per-worker {cpus} must be at least 1")
    resources = WorkerResources(cpus, gpus, loads_model)
    if not resources.room(nodes) and (loads_model or not options.waits_for_nodes):
        kinds = Counter((n.get("CPU", 0), n.get("GPU", 0)) for n in nodes.values())
        has = ", ".join(f"{count} of {c:g} CPUs and {g:g} GPUs" for (c, g), count in kinds.items())
        raise InputError(
            f"no node can hold a worker of {cpus} CPUs and {gpus:g} GPUs; the nodes are {has}. "
            "Lower --cpus-per-worker or --gpus-per-worker"
        )
    return resources


def _default_cpus(nodes: Nodes, gpus: float) -> int:
    """Return the smallest fair share of a GPU node's CPUs, or those of the largest node."""
    if gpus:
        places = [(node.get("CPU", 0), _gpu_places(node, gpus)) for node in nodes.values()]
        share = min((cpus // workers for cpus, workers in places if workers), default=0)
        most = MOST_CPUS_PER_GPU * gpus
    else:
        share = max((node.get("CPU", 0) for node in nodes.values()), default=0)
        most = MOST_CPUS
    return int(max(1, min(most, share)))


def _runtime_env(
    folder: Path, names: Sequence[str], env_vars: Mapping[str, str] | None
) -> dict[str, Any]:
    """Copy our packages into `folder` and say how they reach the workers."""
    packages = []
    for name in names:
        source = Path(str(importlib.import_module(name).__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        packages.append(str(shutil.copytree(source, folder / name, ignore=ignored)))
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    more = {"env_vars": dict(env_vars)} if env_vars else {}
    return more | ({"py_modules": packages} if submitted else {"working_dir": str(folder)})
