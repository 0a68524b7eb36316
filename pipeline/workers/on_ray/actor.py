"""The worker as a Ray actor, and the executor that encodes shards on such actors."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import ray

from pipeline import logs
from pipeline.corpus.shards import Shard
from pipeline.messages import Executor, Outcome, ShardResult, WorkerConfig
from pipeline.workers.on_ray.cluster import RayOptions, connect
from pipeline.workers.on_ray.dispatcher import Dispatcher

if TYPE_CHECKING:
    from pipeline.workers.shard_encoder import ShardEncoder

LAST_LINES_S = 0.5
"""Time for Ray to bring the last log lines of workers to the driver; Ray does not say when."""


class Worker:
    """Actor around a ShardEncoder, which a call loads so that a failure has its own message."""

    _encoder: ShardEncoder

    def node(self) -> str:
        """Return the id of the node on which Ray has put this worker."""
        return str(ray.get_runtime_context().get_node_id())

    def load(self, config: WorkerConfig) -> None:
        """Load the model and open the table; the model goes on a GPU if Ray gave this actor one."""
        # torch takes seconds to import: it is left to what loads a model.
        from pipeline.workers.shard_encoder import ShardEncoder  # noqa: PLC0415

        logs.configure_worker(config.logs)
        assigned = ray.get_runtime_context().get_assigned_resources()
        cpus, gpus = int(assigned["CPU"]), assigned.get("GPU", 0.0)
        # Rayon, Lance and Arrow have thread pools of their own. Without a limit each of them
        # takes all cores of the node, for every worker on it.
        os.environ["RAYON_NUM_THREADS"] = os.environ["LANCE_CPU_THREADS"] = str(cpus)
        pa.set_cpu_count(cpus)
        if gpus:
            self._encoder = ShardEncoder(replace(config, gpu_share=gpus), "cuda")
        else:
            self._encoder = ShardEncoder(replace(config, threads=cpus), "cpu")

    def encode(self, shard: Shard) -> ShardResult:
        """Encode one shard, after `load`. Several calls run at once; see `shards_in_flight`."""
        with logs.in_shard(shard.id):
            try:
                return self._encoder.encode(shard)
            except RuntimeError:
                if self._encoder.device_is_lost():
                    os._exit(1)  # every other shard would fail too: another process takes over
                raise


def on_ray(options: RayOptions) -> Executor:
    """Return the executor that encodes shards on Ray actors."""

    def encode(config: WorkerConfig, shards: Sequence[Shard]) -> Generator[Outcome]:
        try:
            with tempfile.TemporaryDirectory() as folder:
                connect(options, Path(folder))
            with closing(Dispatcher(Worker, options, config, shards)) as dispatcher:
                while dispatcher.num_unfinished():
                    yield from dispatcher.step() or [None]
        finally:
            time.sleep(LAST_LINES_S)
            ray.shutdown()

    return encode
