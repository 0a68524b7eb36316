"""The plan kept beside a table: used while the corpus is what it was, never when it is not."""

import json
import os

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kalm_encoder.errors import IncompleteError, MismatchError
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardReader, plan_shards
from pipeline.messages import Failure
from pipeline.run import kept_plan
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob, plan_job
from pipeline.run.kept_plan import KeptPlan
from pipeline.table.side_files import KEPT_PLANS
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus


def lines(count, name="p"):
    return "".join(json.dumps({"id": f"{name}{i}", "text": "t"}) + "\n" for i in range(count))


@pytest.fixture
def job(tmp_path) -> EncodeJob:
    """Files of every kind, 3 rows a shard."""
    (tmp_path / "a.jsonl").write_text(lines(10))
    (tmp_path / "b.csv").write_text('id,text\n1,"two\nlines"\n2,x\n')
    (tmp_path / "c.tsv").write_text("1\tx\n2\ty\n")
    table = pa.table({"docid": ["1", "2", "3", "4"], "title": ["t"] * 4, "body": ["x"] * 4})
    pq.write_table(table, tmp_path / "d.parquet")
    lance.write_dataset(table, tmp_path / "e.lance")
    return EncodeJob(
        inputs=tuple(map(str, sorted(tmp_path.iterdir()))),
        uri=str(tmp_path / "t.lance"), model="", shard_size=3,
    )  # fmt: skip


def keep(job) -> None:
    KeptPlan(job).write(plan_job(job))


def test_a_kept_plan_is_the_plan(job):
    assert KeptPlan(job).read() is None
    keep(job)
    kept = KeptPlan(job).read()
    assert kept.shards == plan_job(job).shards
    reader = ShardReader()
    assert sum(len(reader.read(shard)[0]) for shard in kept.shards) == 10 + 2 + 2 + 4 + 4


@pytest.mark.parametrize(
    "change",
    [{"shard_size": 4}, {"limit": 12}, {"fields": FieldOptions(title="title")}],
)
def test_other_settings_do_not_find_it(job, change):
    keep(job)
    assert KeptPlan(EncodeJob(**{**vars(job), **change})).read() is None


def test_a_changed_file_does_not_find_it(job, tmp_path):
    keep(job)
    file = tmp_path / "a.jsonl"
    before = file.stat()
    file.write_text(lines(10, "q"))  # the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    assert KeptPlan(job).read() is None
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert KeptPlan(job).read() is not None
    lance.write_dataset(pa.table({"docid": ["5"], "title": ["t"], "body": ["x"]}),
                        tmp_path / "e.lance", mode="append")  # fmt: skip
    assert KeptPlan(job).read() is None


def test_a_moved_corpus_keeps_its_plan(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.jsonl").write_text(lines(10))
    uri = str(tmp_path / "t.lance")
    job = EncodeJob(inputs=(str(tmp_path / "old" / "a.jsonl"),), uri=uri, model="", shard_size=3)
    keep(job)
    (tmp_path / "old").rename(tmp_path / "new")
    moved = EncodeJob(**{**vars(job), "inputs": (str(tmp_path / "new" / "a.jsonl"),)})
    kept = KeptPlan(moved).read()
    assert {shard.path for shard in kept.shards} == set(moved.inputs)
    assert kept.hash == plan_job(moved).hash


@pytest.mark.parametrize("harm", ["cut", "other"])
def test_a_damaged_copy_is_planned_again(job, tmp_path, caplog, harm):
    keep(job)
    (file,) = (tmp_path / "t.lance" / KEPT_PLANS).iterdir()
    if harm == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        plan_hash, shards = json.loads(file.read_text())
        file.write_text(json.dumps([plan_hash, shards[1:]]))
    assert KeptPlan(job).read() is None
    assert "the kept plan cannot be used" in caplog.text


def test_a_store_that_refuses_the_copy_costs_a_warning(job, tmp_path, caplog):
    place = tmp_path / "t.lance" / "_kalm"
    place.mkdir(parents=True)
    (place / "plan").write_text("a file where the folder would be")
    keep(job)
    assert KeptPlan(job).read() is None
    assert "the plan is not kept" in caplog.text


def test_a_file_system_without_a_time_of_change_keeps_no_plan(job, monkeypatch):
    monkeypatch.setattr(kept_plan, "STAMPS", ())
    keep(job)
    assert KeptPlan(job)._path is None
    assert KeptPlan(job).read() is None


def interrupted(config, shards):
    """All but the last shard."""
    yield from in_process(config, shards[:-1])
    yield Failure(shards[-1], 3, "lost")


def test_a_resume_does_not_read_the_corpus_again(model_dir, tmp_path):
    """The done part of the corpus is not even readable any more, and no one looks."""
    files = [write_corpus(tmp_path / f"{n}.jsonl", make_texts(20), prefix=n) for n in "ab"]
    job = EncodeJob(
        inputs=tuple(map(str, files)), uri=str(tmp_path / "t.lance"), model=str(model_dir),
        shard_size=10,
    )  # fmt: skip
    with pytest.raises(IncompleteError):
        run(job, interrupted)
    before = files[0].stat()
    files[0].write_bytes(b"\0" * before.st_size)
    os.utime(files[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    summary = run(job, in_process)
    assert (summary.shards_encoded, summary.num_rows) == (1, 40)


def test_a_file_changed_under_its_identity_is_found_when_it_is_read(model_dir, tmp_path):
    file = write_corpus(tmp_path / "c.jsonl", make_texts(20))
    job = EncodeJob(
        inputs=(str(file),), uri=str(tmp_path / "t.lance"), model=str(model_dir), shard_size=5
    )
    with pytest.raises(IncompleteError):
        run(job, interrupted)
    before = file.stat()
    file.write_bytes(b"\0" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(IncompleteError, match="changed after it was planned"):
        run(job, in_process)
    os.utime(file)
    write_corpus(file, make_texts(21))
    with pytest.raises(MismatchError, match="begun with other input"):
        run(job, in_process)


def test_files_scanned_at_once_make_the_plan_of_one_after_the_other(tmp_path):
    files = []
    for i in range(20):
        files.append(tmp_path / f"{i:02d}.jsonl")
        files[-1].write_text(lines(1 + 7 * i % 11, f"f{i}-"))
    names = expand_inputs(list(map(str, files)), None)
    together = plan_shards(names, shard_size=3)
    assert plan_shards(names, shard_size=3, limit=10**9) == together  # a limit: one by one
    some = plan_shards(names, shard_size=3, limit=together.num_rows - 1)
    assert some.num_rows == together.num_rows - 1
    assert some.shards[:-1] == together.shards[: len(some.shards) - 1]
