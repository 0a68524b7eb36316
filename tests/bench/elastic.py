"""A node joins, a node leaves: a cluster of raylets on this machine, and a stand-in that sleeps.

What is measured is the loop that hands out shards; sleeping workers do not compete for the cores.
"""

from __future__ import annotations

import os
import secrets
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Shard
from pipeline.messages import IN_FLIGHT, Place, ShardResult, Task, Work
from pipeline.workers.on_ray.actor import OnRay, RayOptions
from tests.bench.data import bar

WORKERS_PER_NODE, SHARD_S, SHARDS = 2, 0.2, 600


class Sleeping(Work):
    """Takes SHARD_S for each shard, one shard at a time, and notes each run as a file."""

    loads_model = True

    def start(self, place: Place) -> Sleep:
        return Sleep(Path(self.table.uri))


class Sleep(Task):
    def __init__(self, folder: Path) -> None:
        self._device, self._folder = threading.Lock(), folder

    def do(self, unit: Shard) -> ShardResult:
        (self._folder / f"{unit.number}-{os.getpid()}").touch()
        with self._device:
            time.sleep(SHARD_S)
        node = ray.get_runtime_context().get_node_id()
        return ShardResult(unit, None, 1, worker=f"{node}:{os.getpid()}")


def main() -> list[str]:
    # The workers get our packages, not this one.
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        before, after, twice = _join_and_leave(cluster)
    finally:
        cluster.shutdown()
    print(
        f"shards/s with one node of {WORKERS_PER_NODE} workers {before:.2f}, with two {after:.2f}"
    )
    print(f"shards that ran twice when one left: {twice} of {SHARDS}")
    most = IN_FLIGHT * WORKERS_PER_NODE
    return [
        bar("elastic_join", after / before, ">=", 1.5),
        bar("elastic_leave_extra", twice, "<=", most),
    ]


def _join_and_leave(cluster: Cluster) -> tuple[float, float, int]:
    """Return shards/s on one node, on two, and how many shards ran twice as one left."""
    cluster.add_node(num_cpus=WORKERS_PER_NODE)
    shards = [
        Shard(
            i,
            InputFile("f.jsonl", "jsonl"),
            Fields("id", "text"),
            RowRange(0, 1, 1, 1, f"{i:032x}"),
        )
        for i in range(SHARDS)
    ]
    with tempfile.TemporaryDirectory() as folder:
        options = RayOptions(address=cluster.address, cpus_per_worker=1)
        with closing(OnRay(options)(Sleeping(table=Location(folder)), shards)) as outcomes:
            before = _rate(outcomes, WORKERS_PER_NODE)
            joined = cluster.add_node(num_cpus=WORKERS_PER_NODE)
            after = _rate(outcomes, 2 * WORKERS_PER_NODE)
            cluster.remove_node(joined)
            for _ in outcomes:
                pass
        return before, after, len(list(Path(folder).iterdir())) - SHARDS


def _rate(outcomes, num_workers: int, shards: int = 100) -> float:
    """Return shards/s over so many shards, once so many workers have given one."""
    seen: set[str] = set()
    while len(seen) < num_workers:
        if outcome := next(outcomes):
            seen.add(outcome.worker)
    began, count = time.monotonic(), 0
    while count < shards:
        count += next(outcomes) is not None
    return count / (time.monotonic() - began)
