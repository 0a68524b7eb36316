"""A cluster of several raylets on this machine: nodes join and leave, GPUs are shared, pages read.

The stand-in encoder leaves a file for each start of a worker and each run of a shard.
"""

import os
import re
import secrets
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Shard
from pipeline.messages import IN_FLIGHT, Part, ShardResult, Task, Work
from pipeline.run.records import read_records
from pipeline.table.steps import PartResult
from pipeline.workers.on_ray.actor import OnRay, RayOptions, Worker
from pipeline.workers.on_ray.cluster import connect
from pipeline.workers.on_ray.pool import WorkerPool
from tests.conftest import make_texts, write_corpus
from tests.support.commands import HANG_S

# The workers get our packages, not this one.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
POLL_S = 0.02


class Noting(Work):
    """Notes what it does; encodes nothing before as many workers run as the shard's lines say."""

    loads_model = True

    def start(self, place):
        folder = Path(self.table.uri)
        (folder / f"worker-{os.getpid()}").touch()
        return NotingTask(folder)


class NotingTask(Task):
    def __init__(self, folder):
        self._folder = folder

    def do(self, unit):
        if isinstance(unit, Part):
            return PartResult(unit, unit.number)
        node = ray.get_runtime_context().get_node_id()
        (self._folder / f"run-{unit.number}-{node}").touch()
        while len(list(self._folder.glob("worker-*"))) < unit.rows.first_line:
            time.sleep(POLL_S)
        time.sleep(0.05)
        return ShardResult(unit, None, 1, worker=f"{node}:{os.getpid()}:{ray.get_gpu_ids()}")


class NotingStep(Noting):
    """Does parts of a step, for which a worker loads no model."""

    loads_model = False
    is_large = True


def make_shards(count, *, workers_first=1):
    return [
        Shard(
            i,
            InputFile("f.jsonl", "jsonl"),
            Fields("id", "text"),
            RowRange(0, 9, workers_first, 1, f"{i:032x}"),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def cluster():
    # As `connect` does for a cluster of its own: Ray would write one into the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    head = {"num_cpus": 0, "_system_config": {"metrics_report_interval_ms": 500}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def start(cluster, monkeypatch, tmp_path):
    """Return the function that starts a run of stand-ins; nodes are gone after the test."""
    monkeypatch.setattr("pipeline.workers.on_ray.pool.LOOK_EVERY_S", 0.2)

    def run(shards, **options):
        execute = OnRay(RayOptions(address=cluster.address, **options))
        return closing(execute(Noting(table=Location(str(tmp_path))), shards))

    yield run
    for node in list(cluster.worker_nodes):
        cluster.remove_node(node)


def node_of(result):
    return result.worker.split(":")[0]


def test_a_node_that_joins_gets_shards(cluster, start):
    first = cluster.add_node(num_cpus=1)
    with start(make_shards(100_000)) as outcomes:
        assert node_of(next(filter(None, outcomes))) == first.node_id
        second = cluster.add_node(num_cpus=1)
        assert any(node_of(o) == second.node_id for o in outcomes if o)


def test_a_node_that_leaves_costs_its_own_shards_alone(cluster, start, tmp_path, caplog):
    stays, leaves = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    done = Counter()
    with start(make_shards(60, workers_first=2)) as outcomes:
        for outcome in filter(None, outcomes):
            done[outcome.shard.number] += 1
            if len(done) == 10:
                cluster.remove_node(leaves)
    assert done == Counter(range(60))
    runs = Counter(path.name.split("-")[1] for path in tmp_path.glob("run-*"))
    twice = [number for number, count in runs.items() if count > 1]
    assert len(twice) <= IN_FLIGHT  # none, if the node left just when it had no shard
    assert all((tmp_path / f"run-{number}-{leaves.node_id}").exists() for number in twice)
    assert all((tmp_path / f"run-{number}-{stays.node_id}").exists() for number in twice)
    assert "a worker died" not in caplog.text  # preemption is no worker's fault
    assert "failed (attempt" not in caplog.text


def test_workers_asked_for_start_when_there_is_room(cluster, start, tmp_path):
    cluster.add_node(num_cpus=1)
    with start(make_shards(20, workers_first=2), num_workers=2) as outcomes:
        assert next(outcomes) is None  # one worker waits for another
        cluster.add_node(num_cpus=1)
        assert len({o.worker for o in outcomes if o}) == 2


def test_a_step_waits_for_the_nodes_that_the_step_before_had(cluster, start, tmp_path):
    options, step = RayOptions(address=cluster.address), NotingStep(table=Location(str(tmp_path)))
    parts = [Part(number, None) for number in range(9)]
    node = cluster.add_node(num_cpus=1)
    with OnRay(options) as execute:
        assert len(list(filter(None, execute(step, parts)))) == 9
        cluster.remove_node(node)
        while any(n["NodeID"] == node.node_id and n["Alive"] for n in ray.nodes()):
            time.sleep(POLL_S)
        with closing(execute(step, parts)) as outcomes:
            assert next(outcomes) is None
            cluster.add_node(num_cpus=1)
            assert len(list(filter(None, outcomes))) == 9


def test_workers_without_a_place_are_given_up_when_no_longer_wanted(cluster, start, tmp_path):
    cluster.add_node(num_cpus=1)
    options = RayOptions(address=cluster.address, num_workers=3)
    connect(options, tmp_path)
    try:
        answers = SimpleQueue()
        pool = WorkerPool(Worker, options, Noting(table=Location(str(tmp_path))), answers)
        pool.adjust(3)
        assert len(pool.workers) == 3
        while not any(worker.node for worker in pool.workers):
            pool.started(answers.get(timeout=HANG_S))
        pool.adjust(1)
        assert [bool(worker.node) for worker in pool.workers] == [True]
    finally:
        ray.shutdown()


def test_two_workers_share_a_gpu(cluster, start):
    cluster.add_node(num_cpus=2, num_gpus=1)
    with start(make_shards(20, workers_first=2), gpus_per_worker=0.5) as outcomes:
        places = {o.worker for o in outcomes if o}
    assert len(places) == 2
    assert {place.split(":")[2] for place in places} == {"[0]"}


def test_gpus_that_no_node_has_fail_at_once(cluster, start):
    cluster.add_node(num_cpus=1)
    outcomes = start(make_shards(1), gpus_per_worker=1)
    with pytest.raises(InputError, match="worker of 1 CPUs and 1 GPUs"), outcomes as run:
        next(run)


def test_the_metrics_pages_of_the_nodes_say_what_the_run_did(cluster, start, model_dir, tmp_path):
    cluster.add_node(num_cpus=1)
    corpus = write_corpus(tmp_path / "corpus.jsonl", make_texts(40))
    with corpus.open("a") as file:
        file.write("no JSON\n")
    table = str(tmp_path / "t.lance")
    command = [
        "encode",
        str(corpus),
        "--to",
        table,
        "--model",
        str(model_dir),
        "--max-length",
        "20",
    ]
    options = ["--shard-size", "10", "--max-rejected", "0.1", "--address", cluster.address]
    # A process of its own, as Ray counts a second run of one process twice.
    subprocess.run([sys.executable, "-m", "jobs", *command, *options], check=True)
    want = Counter()
    for record in read_records(Location(str(table))):
        want.update(shards=1, passages=record.rows, rejected=record.rejected, tokens=record.tokens)
        want.update(padded_tokens=record.padded_tokens, truncated=record.truncated)
        want.update({f"seconds {stage}": spent for stage, spent in record.seconds.items()})
    assert want["rejected"] == 1
    assert want["truncated"] > 0
    deadline = time.monotonic() + HANG_S
    while (seen := read_metrics(cluster, table))["shards"] < 5 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert seen == pytest.approx({**want, "workers": 0}, rel=0.01, abs=0.001)


def read_metrics(cluster, table):
    """Add up the numbers of one table over all workers, as the pages of the nodes have them."""
    totals = Counter()
    for node in cluster.global_state.node_table():
        if node["Alive"]:
            url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(url, timeout=HANG_S) as reply:
                page = reply.read().decode()
            pattern = r"^ray_kalm_encode_(\w+)\{(.*)\} (\S+)$"
            for name, tags, value in re.findall(pattern, page, re.MULTILINE):
                if f'table="{table}"' in tags:
                    stage = re.search(r'stage="(\w+)"', tags)
                    key = name.removesuffix("_total") + (f" {stage[1]}" if stage else "")
                    totals[key] += float(value)
    return totals
