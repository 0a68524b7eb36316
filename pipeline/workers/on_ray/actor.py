"""The worker as a Ray actor, and the executor that does the units of a work on such actors."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import ray

from pipeline import logs
from pipeline.messages import Outcome, Place, Task, Unit, Work
from pipeline.workers.local import in_process
from pipeline.workers.on_ray.cluster import RayOptions, connect
from pipeline.workers.on_ray.dispatcher import Dispatcher

LAST_LINES_S = 0.5
"""Time for Ray to bring the last log lines of workers to the driver; Ray does not say when."""
FEW_UNITS = 8
"""With fewer units, a step that loads no model runs in the driver's process, unless workers or a
cluster were asked for: it is done before workers would have started. A large work never does."""


class Worker:
    """Actor around a task, which a call loads so that a failure has its own message."""

    _task: Task

    def node(self) -> str:
        """Return the id of the node on which Ray has put this worker."""
        return str(ray.get_runtime_context().get_node_id())

    def load(self, work: Work) -> None:
        """Load what the units of a work need; a model goes on a GPU if this actor has one."""
        logs.configure_worker(work.logs)
        assigned = ray.get_runtime_context().get_assigned_resources()
        cpus, gpus = int(assigned["CPU"]), assigned.get("GPU", 0.0)
        # Rayon, Lance and Arrow have thread pools of their own. Without a limit each of them
        # takes all cores of the node, for every worker on it.
        os.environ["RAYON_NUM_THREADS"] = os.environ["LANCE_CPU_THREADS"] = str(cpus)
        pa.set_cpu_count(cpus)
        self._task = work.start(Place(cpus, gpus))

    def do(self, unit: Unit) -> Any:
        """Do one unit, after `load`. Several calls run at once; see `WorkerResources.in_flight`."""
        with logs.in_shard(unit.id):
            try:
                return self._task.do(unit)
            except RuntimeError:
                if self._task.device_is_lost():
                    os._exit(1)  # every other unit would fail too: another process takes over
                raise


class OnRay:
    """The executor that does units on Ray actors.

    As a context it stays connected from its first call to its end, so that the steps of a command
    share one cluster. Otherwise each call connects by itself.

    Args:
        options: Where and on what to run.
    """

    def __init__(self, options: RayOptions) -> None:
        self._options = options
        self._is_kept = self._is_connected = False

    def __enter__(self) -> Self:
        self._is_kept = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_kept = False
        self._disconnect()

    def __call__(self, work: Work, units: Sequence[Unit]) -> Generator[Outcome]:
        """Do units on workers and yield their outcomes as they arrive.

        Raises:
            InputError: If there is no such cluster, or no node can hold one worker.
            KalmError: If the work cannot be loaded, or workers keep dying.
        """
        if not (work.loads_model or work.is_large) and self._are_few(units):
            yield from in_process(work, units)
            return
        try:
            if not self._is_connected:
                with tempfile.TemporaryDirectory() as folder:
                    connect(self._options, Path(folder))
                self._is_connected = True
            with closing(Dispatcher(Worker, self._options, work, units)) as dispatcher:
                # There was room for workers, so nodes that have left by the next step come back.
                self._options = replace(self._options, waits_for_nodes=True)
                while dispatcher.num_unfinished():
                    yield from dispatcher.step() or [None]
        finally:
            if not self._is_kept:
                self._disconnect()

    def _are_few(self, units: Sequence[Unit]) -> bool:
        options = self._options
        was_asked = options.address or os.environ.get("RAY_ADDRESS") or options.num_workers
        return len(units) == 1 or (len(units) < FEW_UNITS and not was_asked)

    def _disconnect(self) -> None:
        if self._is_connected:
            self._is_connected = False
            time.sleep(LAST_LINES_S)
            ray.shutdown()
