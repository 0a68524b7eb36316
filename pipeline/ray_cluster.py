"""Joining or starting a Ray cluster, and what one worker may ask of it."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from kalm_encoder.errors import InputError
from pipeline import logs

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RayOptions:
    """Where and on what to run.

    Attributes:
        address: of a cluster; None takes RAY_ADDRESS, else starts a cluster on this machine.
        num_workers: None takes one a GPU, or where there is none as many as the CPUs hold.
        cpus_per_worker: threads of a CPU worker; None takes up to 4.
        shard_timeout_s: a worker that takes longer for one shard is replaced.
        start_timeout_s: how long no worker at all may become ready.
    """

    address: str | None = None
    num_workers: int | None = None
    cpus_per_worker: int | None = None
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


def worker_shape(options: RayOptions, num_shards: int) -> tuple[int, int, int]:
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
        cpus, per_worker = options.cpus_per_worker or max(1, min(4, most_cpus)), 0
        room = int(sum(node.get("CPU", 0) // cpus for node in nodes))
    if cpus > most_cpus or room == 0:
        raise InputError(
            f"no node can hold a worker of {cpus} CPUs and {per_worker} GPUs; the largest has "
            f"{most_cpus} CPUs. Lower --cpus-per-worker"
        )
    return min(options.num_workers or room, num_shards), cpus, per_worker


def _runtime_env(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Copy our packages into `folder` and say how they reach the workers."""
    packages = []
    for name in names:
        source = Path(str(importlib.import_module(name).__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        packages.append(str(shutil.copytree(source, folder / name, ignore=ignored)))
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    return {"py_modules": packages} if submitted else {"working_dir": str(folder)}
