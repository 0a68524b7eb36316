"""Workers make the plan that this process makes, and find the same faults."""

import contextlib
import gzip
import json
import os
import signal
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.run import planning
from pipeline.run.job import EncodeJob, plan_job
from pipeline.run.plan_work import Block, PlanWork
from pipeline.workers.local import in_process
from pipeline.workers.on_ray.actor import OnRay, RayOptions


def on_workers(work, units):
    """The executor of a worker, without Ray: what `plan_job` does not take for this process."""
    yield from in_process(work, units)


def jsonl(first, count):
    return "".join(
        json.dumps({"_id": f"p{i}", "text": "a word " * (i % 9)}) + "\n" + "\n" * (i % 5 == 0)
        for i in range(first, first + count)
    )


@pytest.fixture
def small(monkeypatch):
    """Sizes with which a small corpus has file groups, large files, and many blocks."""
    for name, value in {
        "SMALL_CORPUS_BYTES": 1,
        "GROUP_BYTES": 3000,
        "OPEN_BYTES": 10,
        "LARGE_FILE_BYTES": 4000,
        "BLOCK_BYTES": 700,
    }.items():
        monkeypatch.setattr(planning, name, value)


@pytest.fixture
def corpus(tmp_path):
    files = {
        "a.jsonl": jsonl(0, 10),
        "b.jsonl": jsonl(100, 200),
        "c.tsv": "id\ttext\n" + "".join(f'{i}\t"a ""row"" {i}"\r\n' for i in range(300)),
        "d.csv": "id,text\n" + "".join(f'{i},"two\nlines"\n' for i in range(300)),
        "e.jsonl": "\n \n" * 3000,
        "f.jsonl": "\n" * 2000 + jsonl(1000, 100),
        "g.jsonl": gzip.compress(os.urandom(9000).hex().encode() + b"\n"),
        "h.jsonl.gz": gzip.compress(jsonl(2000, 50).encode()),
        "j.tsv": "7\tno header\n" * 500,
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    pq.write_table(pa.table({"id": ["x", "y"], "text": ["1", "2"]}), tmp_path / "i.parquet")
    return tmp_path


def job_of(folder, **options):
    options = {"shard_size": 7, **options}
    return EncodeJob(inputs=(str(folder),), uri=str(folder / "t.lance"), model="", **options)


@pytest.mark.parametrize("shard_size", [1, 7, 64, 10_000])
def test_workers_make_the_same_plan(corpus, small, shard_size):
    job = job_of(corpus, shard_size=shard_size)
    known, done = plan_job(job), []

    def noted(work, units):
        done.extend(type(unit.what).__name__ for unit in units)
        yield from in_process(work, units)

    plan = plan_job(job, execute=noted)
    assert plan == known
    assert (plan.hash, plan.readings) == (known.hash, known.readings)
    assert done.count("Block") > 30 and done.count("FileGroup") > 2
    assert done.count("BlockShards") > (30 if shard_size < 10 else 2)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("c.tsv", "id\ttext\n" + "1\ta\n" * 999 + '2\t"open\n3\tb\n', "c.tsv line 1001: a quo"),
        ("d.csv", "id,text\n" + "1,a\n" * 999 + '2,"open\n' * 3, "d.csv line 1001: a quoted"),
        ("h.jsonl.gz", gzip.compress(jsonl(0, 50).encode())[:-20], "h.jsonl.gz.*it is damaged"),
        ("b.jsonl", '{"key": 1, "body": "a"}\n' * 999, "b.jsonl"),
        ("i.parquet", "PAR1 and nothing else", "i.parquet: Parquet magic bytes not found"),
    ],
)
def test_workers_find_the_same_faults(corpus, small, name, content, fault):
    (corpus / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    job = job_of(corpus)
    with pytest.raises(InputError, match=fault) as known:
        plan_job(job)
    with pytest.raises(InputError) as found:
        plan_job(job, execute=on_workers)
    assert str(found.value) == str(known.value)


def backwards(work, units):
    yield from reversed(list(in_process(work, units)))


def test_the_first_of_several_faults_is_told(corpus, small):
    for name in ("f.jsonl", "a.jsonl", "i.parquet"):
        (corpus / name).write_text('{"key": 1, "body": "a"}\n' * 9)
    with pytest.raises(InputError, match=r"a\.jsonl"):
        plan_job(job_of(corpus), execute=backwards)


def no_workers(work, units):
    raise AssertionError("workers were asked")
    yield


def test_a_small_corpus_and_the_first_rows_of_any_are_planned_here(corpus, small, monkeypatch):
    limited = job_of(corpus, limit=100)
    assert plan_job(limited, execute=no_workers).num_rows == 100
    monkeypatch.setattr(planning, "SMALL_CORPUS_BYTES", 1 << 20)
    assert plan_job(job_of(corpus), execute=no_workers) == plan_job(job_of(corpus))


class KilledOnce(PlanWork):
    """Kills its worker at the first block that is counted."""

    def load(self, place):
        plan = super().load(place)

        def plan_or_die(what):
            if isinstance(what, Block):
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.table.uri)
                    os.kill(os.getpid(), signal.SIGKILL)
            return plan(what)

        return plan_or_die


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_parts_alone(corpus, small, tmp_path_factory):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers have no tests
    died = tmp_path_factory.mktemp("died") / "t.lance"
    with OnRay(RayOptions(address="local", num_workers=1, cpus_per_worker=1)) as on_ray:

        def execute(work, units):
            yield from on_ray(KilledOnce(**{**vars(work), "table": Location(str(died))}), units)

        assert plan_job(job_of(corpus), execute=execute) == plan_job(job_of(corpus))
    assert died.exists()
