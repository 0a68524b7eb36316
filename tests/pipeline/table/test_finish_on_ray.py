"""A table is finished by Ray workers of which one is killed in each step."""

import os
import secrets
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import lance
import pytest
from ray import cloudpickle
from ray.cluster_utils import Cluster

from kalm_encoder.table.location import Location
from pipeline.messages import Task, Work
from pipeline.table import duplicates, finish, indexes, partitions
from pipeline.table.finish import SealedTable
from pipeline.table.steps import Steps
from pipeline.workers.on_ray.actor import OnRay, RayOptions
from tests.pipeline.table.test_finish import SHARD, answers, make_rows, sealed, survivors, texts_of

# The workers get our packages, not this one.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True, kw_only=True)
class DyingOnce(Work):
    """Some work; the worker that does the first part of it is killed when it has written it."""

    work: Work
    folder: str

    def start(self, place):
        return DyingTask(self.work.start(place), Path(self.folder, type(self.work).__name__))


class DyingTask(Task):
    def __init__(self, task, mark):
        self._task, self._mark = task, mark

    def do(self, unit):
        result = self._task.do(unit)
        if unit.number == 0 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return result


@pytest.fixture
def address():
    # As `connect` does for a cluster of its own: Ray would write one into the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    yield cluster.address
    cluster.shutdown()


@pytest.mark.slow
def test_workers_killed_in_each_step_change_nothing(address, tmp_path, monkeypatch):
    monkeypatch.setattr(duplicates, "GROUP_ROWS", 3 * SHARD)
    monkeypatch.setattr(partitions, "PARTITION_ROWS", 50)
    monkeypatch.setattr(finish, "FRAGMENT_ROWS", 3 * SHARD)
    monkeypatch.setattr(indexes, "GROUP_ROWS", 50)
    rows = make_rows(11)
    uri = sealed(tmp_path, rows, "last")
    killed = tmp_path / "killed"
    killed.mkdir()
    with OnRay(RayOptions(address=address, num_workers=2, cpus_per_worker=1)) as on_ray:

        def execute(work, parts):
            dying = DyingOnce(table=work.table, work=work, folder=str(killed))
            yield from on_ray(dying, parts)

        SealedTable(Location(uri)).finish(Steps(execute), index_columns=["year", "tags"])
    assert {mark.name for mark in killed.iterdir()} == {
        "HashIds", "FindRepeated", "DeleteRows", "RewriteFragments", "BuildSegments",
        "MergeSegments",
    }  # fmt: skip
    assert texts_of(uri) == survivors(rows, "last")
    answers(lance.dataset(uri))
    assert [len(index.segments) for index in lance.dataset(uri).describe_indices()] == [1] * 4
