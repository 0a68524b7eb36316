"""The Ray loop with real actors and real deaths; a stand-in encoder where only the loop matters."""

import os
import secrets
import signal
import subprocess
import sys
import time

import pytest
from ray import cloudpickle
from ray.cluster_utils import Cluster

from kalm_encoder.errors import InputError, KalmError
from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Shard
from pipeline.messages import ShardFailure, ShardResult, WorkerConfig
from pipeline.workers.on_ray import actor as workers
from pipeline.workers.on_ray.actor import RayOptions, Worker, on_ray
from tests.pipeline.table.test_ledger import SPEC

CONFIG = WorkerConfig(Location("unused"), SPEC)
# The workers get our packages, not this one.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def make_shards(count):
    return [
        Shard(
            i,
            InputFile("file.jsonl", "jsonl"),
            Fields("id", "text"),
            RowRange(0, 1, 1, 1, f"{i:032x}"),
        )
        for i in range(count)
    ]


class Troubled(Worker):
    """Does what the number of the shard says: real exceptions, exits and hangs."""

    def load(self, config):
        pass

    def encode(self, shard):
        time.sleep(0.05)
        if shard.number == 3:
            raise ValueError("this shard is poison")
        if shard.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.number == 7:
            time.sleep(3600)
        return ShardResult(shard, None, 1)


class Unloadable(Worker):
    def load(self, config):
        raise InputError("the model is missing")


class Dying(Worker):
    def load(self, config):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def address():
    """One cluster for all tests: its start takes seconds."""
    # As `connect` does for a cluster of its own: Ray would write one into the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster.address
    cluster.shutdown()


def outcomes(worker, monkeypatch, shards, **options):
    monkeypatch.setattr(workers, "Worker", worker)
    options = {"num_workers": 2, "cpus_per_worker": 1, **options}
    return [o for o in on_ray(RayOptions(**options))(CONFIG, shards) if o is not None]


def test_bad_shards_are_named_and_all_others_finish(monkeypatch, address):
    got = outcomes(Troubled, monkeypatch, make_shards(12), shard_timeout_s=10, address=address)
    done = sorted(o.shard.number for o in got if isinstance(o, ShardResult))
    failed = {o.shard.number: o for o in got if isinstance(o, ShardFailure)}
    assert done == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert set(failed) == {3, 5, 7}
    assert failed[3].reason == "ValueError: this shard is poison"
    assert "worker died" in failed[5].reason
    assert "no result after 10 s" in failed[7].reason
    assert all(f.attempts == 3 for f in failed.values())


def test_a_worker_that_cannot_load_ends_the_job_with_its_error(monkeypatch, address):
    with pytest.raises(InputError, match="the model is missing"):
        outcomes(Unloadable, monkeypatch, make_shards(2), address=address)


def test_workers_that_die_at_once_end_the_job(monkeypatch, address):
    with pytest.raises(KalmError, match="workers keep dying"):
        outcomes(Dying, monkeypatch, make_shards(1), address=address)


def test_an_impossible_request_fails_at_once(monkeypatch, address):
    with pytest.raises(InputError, match="no node can hold a worker of 4096 CPUs"):
        outcomes(Troubled, monkeypatch, make_shards(1), cpus_per_worker=4096, address=address)


DEEP = """
import os, ray
from pathlib import Path
from kalm_encoder.errors import InputError
from pipeline.workers.on_ray.cluster import RayOptions, connect
try:
    connect(RayOptions(), Path("first"))
except InputError as error:
    print(error)
os.environ["RAY_TMPDIR"] = "/tmp"
connect(RayOptions(), Path("second"))
print("joined", ray.is_initialized())
"""


def test_a_temporary_folder_too_deep_for_sockets_is_named_with_its_variable(tmp_path):
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", DEEP], cwd=tmp_path, capture_output=True, text=True,
        env={**environment, "TMPDIR": str(deep), "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    says, joined = done.stdout.splitlines()
    assert "107 bytes" in says
    assert f"below TMPDIR ({deep}): set RAY_TMPDIR to a shorter folder" in says
    assert joined == "joined True"


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    with pytest.raises(InputError, match="no Ray cluster answers"):
        outcomes(Troubled, monkeypatch, make_shards(1), address="127.0.0.1:1")
