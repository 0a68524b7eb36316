"""The Ray loop with real actors and real deaths; a stand-in encoder where only the loop matters."""

import os
import secrets
import signal
import subprocess
import sys
import time

import pytest
import ray
from ray import cloudpickle
from ray.cluster_utils import Cluster

from kalm_encoder.errors import InputError, KalmError
from kalm_encoder.table.location import Location
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Shard
from pipeline.messages import Failure, Part, ShardResult, Task, Work
from pipeline.table.steps import PartResult
from pipeline.workers.on_ray.actor import OnRay, RayOptions

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


class Trouble(Task):
    """Does what the number of the shard says: real exceptions, exits and hangs."""

    def do(self, unit):
        time.sleep(0.05)
        if unit.number == 3:
            raise ValueError("this shard is poison")
        if unit.number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.number == 7:
            time.sleep(3600)
        return ShardResult(unit, None, 1)


class Troubled(Work):
    loads_model = True  # or a step of one unit would run in this process

    def start(self, place):
        return Trouble()


class Unloadable(Troubled):
    def start(self, place):
        raise InputError("the model is missing")


class Dying(Troubled):
    def start(self, place):
        os.kill(os.getpid(), signal.SIGKILL)


class Telling(Work):
    """Tells in which process it runs."""

    def start(self, place):
        return Tell()


class Tell(Task):
    def do(self, unit):
        return PartResult(unit, os.getpid())


@pytest.fixture(scope="module")
def address():
    """One cluster for all tests: its start takes seconds."""
    # As `connect` does for a cluster of its own: Ray would write one into the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster.address
    cluster.shutdown()


def outcomes(work, shards, **options):
    options = {"num_workers": 2, "cpus_per_worker": 1, **options}
    execute, work = OnRay(RayOptions(**options)), work(table=Location("unused"))
    return [o for o in execute(work, shards) if o is not None]


def test_bad_shards_are_named_and_all_others_finish(address):
    got = outcomes(Troubled, make_shards(12), unit_timeout_s=10, address=address)
    done = sorted(o.shard.number for o in got if isinstance(o, ShardResult))
    failed = {o.unit.number: o for o in got if isinstance(o, Failure)}
    assert done == [0, 1, 2, 4, 6, 8, 9, 10, 11]
    assert set(failed) == {3, 5, 7}
    assert failed[3].reason == "ValueError: this shard is poison"
    assert "worker died" in failed[5].reason
    assert "no result after 10 s" in failed[7].reason
    assert all(f.attempts == 3 for f in failed.values())


def test_a_worker_that_cannot_load_ends_the_job_with_its_error(address):
    with pytest.raises(InputError, match="the model is missing"):
        outcomes(Unloadable, make_shards(2), address=address)


def test_workers_that_die_at_once_end_the_job(address):
    with pytest.raises(KalmError, match="workers keep dying"):
        outcomes(Dying, make_shards(1), address=address)


@pytest.mark.parametrize("is_large", [False, True])
def test_one_unit_of_a_step_leaves_the_driver_only_if_it_is_large(address, is_large):
    execute = OnRay(RayOptions(address=address, num_workers=1, cpus_per_worker=1))
    work = Telling(table=Location("unused"), is_large=is_large)
    (result,) = filter(None, execute(work, [Part(0, None)]))
    assert (result.value != os.getpid()) == is_large


def test_an_impossible_request_fails_at_once(address):
    with pytest.raises(InputError, match="no node can hold a worker of 4096 CPUs"):
        outcomes(Troubled, make_shards(1), cpus_per_worker=4096, address=address)


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


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(InputError, match="no Ray cluster answers"):
        outcomes(Troubled, make_shards(1), address="127.0.0.1:1")


class Naming(Work):
    """A step without a model, whose units say where they ran."""

    def start(self, place):
        return NamingTask()


class NamingTask(Task):
    def do(self, unit):
        return os.getpid()


def test_the_steps_of_a_command_share_a_connection_and_one_unit_needs_no_worker(address):
    work, trouble = Naming(table=Location("unused")), Troubled(table=Location("unused"))
    options = RayOptions(address=address, num_workers=1, cpus_per_worker=1)
    with OnRay(options) as execute:
        assert list(execute(work, make_shards(1))) == [os.getpid()]
        assert not ray.is_initialized()
        first = {o for o in execute(work, make_shards(2)) if o is not None}
        assert os.getpid() not in first
        job = ray.get_runtime_context().get_job_id()
        assert len([o for o in execute(trouble, make_shards(2)) if o]) == 2  # with the freed CPUs
        assert ray.get_runtime_context().get_job_id() == job
    assert not ray.is_initialized()
