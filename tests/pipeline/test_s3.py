"""Corpus and table on S3: a real server process, the same code as on disk."""

import json

import lance
import pytest
import s3fs

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.run import plan_work, planning
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob, plan_job
from pipeline.run.kept_plan import KeptPlan
from pipeline.table.preflight import check_writable, examine
from pipeline.table.publish import rollback
from pipeline.table.rejects import RejectStore
from pipeline.upkeep.delete import compact, delete
from pipeline.upkeep.garbage import collect_garbage
from pipeline.upkeep.sync import sync
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus
from tests.support.commands import kalm
from tests.support.s3_server import serve

TABLE = "s3://bucket/tables/t.lance"


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("s3")) as server:
        yield server


def put_corpus(s3, name, texts, *, bad=0):
    file = write_corpus(s3.folder / "bucket" / name, texts)
    with file.open("a") as lines:
        lines.write("not json\n" * bad)
    return f"s3://bucket/{name}"


def test_a_table_lives_on_s3_from_encode_to_gc(s3, model_dir):
    texts = make_texts(40)
    corpus = put_corpus(s3, "c.jsonl", texts, bad=1)
    job = EncodeJob(
        inputs=(corpus,), uri=TABLE, model=str(model_dir), shard_size=10, max_rejected=0.1,
        storage_options=s3.options,
    )  # fmt: skip
    summary = run(job, in_process)
    assert (summary.num_rows, summary.num_rejected, summary.live) == (40, 1, True)
    assert run(job, in_process).shards_encoded == 0
    table = PassageTable.open(TABLE, storage_options=s3.options)
    assert len(table.take([f"p{i}" for i in range(40)])) == 40
    assert [r.line for r in RejectStore(Location(TABLE, s3.options)).read()] == [41]
    assert verify(TABLE, storage_options=s3.options).num_problems == 0

    put_corpus(s3, "c.jsonl", ["changed", *texts[1:], "new"])
    changes, _ = sync(job, in_process)
    assert (changes.unchanged, changes.changed, changes.new, changes.missing) == (39, 1, 1, 0)
    assert delete(Location(TABLE, s3.options), ["p3"]) == 1
    compact(Location(TABLE, s3.options))
    assert verify(TABLE, storage_options=s3.options).num_problems == 0
    assert len(PassageTable.open(TABLE, storage_options=s3.options)) == 40
    rollback(Location(TABLE, s3.options))
    assert len(PassageTable.open(TABLE, storage_options=s3.options)) == 40
    stats = collect_garbage(Location(TABLE, s3.options), dry_run=True)
    assert stats.versions == 0  # all are younger than a week
    staged = (s3.folder / "bucket" / "tables" / "t.lance" / "_kalm" / "sync").rglob("*")
    assert not [path for path in staged if path.is_file()]


def test_a_plan_is_kept_on_s3_until_the_corpus_changes(s3):
    corpus = put_corpus(s3, "kept.jsonl", ["a"] * 9)
    job = EncodeJob(
        inputs=(corpus,), uri="s3://bucket/tables/kept.lance", model="", shard_size=2,
        storage_options=s3.options,
    )  # fmt: skip
    plan = plan_job(job)
    KeptPlan(job).write(plan)
    assert KeptPlan(job).read().shards == plan.shards
    put_corpus(s3, "kept.jsonl", ["b"] * 9)
    assert KeptPlan(job).read() is None


def test_a_large_file_on_s3_is_planned_in_blocks(s3, monkeypatch):
    corpus = put_corpus(s3, "large.jsonl", make_texts(3000))
    job = EncodeJob(
        inputs=(corpus,), uri="s3://bucket/tables/large.lance", model="", shard_size=70,
        storage_options=s3.options,
    )  # fmt: skip
    known, size = plan_job(job), (s3.folder / "bucket" / "large.jsonl").stat().st_size
    monkeypatch.setattr(planning, "SMALL_CORPUS_BYTES", 1)
    monkeypatch.setattr(planning, "LARGE_FILE_BYTES", 1)
    monkeypatch.setattr(planning, "BLOCK_BYTES", size // 8 + 1)
    monkeypatch.setattr(plan_work, "BLOCK_READ_BYTES", size // 80)
    blocks = []

    def execute(work, units):
        blocks.append(len(units))
        yield from in_process(work, units)

    before = s3.stats()["bytes_sent"]
    assert plan_job(job, execute=execute) == known
    assert blocks == [8, 8]
    # Its first rows are looked at, and each block is read twice with a little behind its end.
    assert s3.stats()["bytes_sent"] - before < 3.8 * size


def test_secrets_are_written_nowhere(s3, model_dir, caplog):
    files = [p for p in (s3.folder / "bucket").rglob("*") if p.is_file()]
    assert files
    assert not [p for p in files if b"test-secret" in p.read_bytes()]
    assert "test-secret" not in caplog.text


def test_doctor_finds_nothing_wrong(s3):
    checks = list(examine(Location("s3://bucket/other.lance", s3.options)))
    assert len(checks) == 15
    assert [c for c in checks if c.problem] == []
    assert not [p for p in (s3.folder / "bucket" / "other.lance").rglob("*") if p.is_file()]


@pytest.mark.parametrize(
    ("change", "uri", "says"),
    [
        ({"aws_access_key_id": "wrong"}, TABLE, "refuses the credentials"),
        ({}, "s3://nowhere/t.lance", "bucket does not exist"),
        ({"aws_endpoint": "http://127.0.0.1:9"}, TABLE, "nothing answers there"),
    ],
)
def test_what_is_wrong_with_a_store_is_explained(s3, monkeypatch, change, uri, says):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore would wait before it asks again
    options = {**s3.options, **change}
    assert says in " ".join(c.problem or "" for c in examine_first(uri, options))
    with pytest.raises(InputError, match=says):
        check_writable(Location(uri, options))


def test_wrong_credentials_end_the_command(s3, model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(3))
    wrong = [a.replace("test-key", "expired") for a in s3.arguments]
    for inputs in (str(corpus), "s3://bucket/c.jsonl"):
        done = kalm(
            *("encode", inputs, "--to", "s3://bucket/w.lance", "--model", model_dir),
            *("--workers", 0, *wrong),
            check=2,
        )
        assert "kalm: error: cannot" in done.stderr
    assert not (s3.folder / "bucket" / "w.lance").exists()


def examine_first(uri, options):
    """The checks up to the first that fails: what follows waits for a store that is not there."""
    for check in examine(Location(uri, options)):
        yield check
        if check.problem:
            return


def test_a_store_without_conditional_writes_is_refused(model_dir, tmp_path):
    with serve(tmp_path / "s3", conditional=False) as s3:
        corpus = write_corpus(tmp_path / "c.jsonl", make_texts(3))
        job = EncodeJob(
            inputs=(str(corpus),), uri=TABLE, model=str(model_dir), storage_options=s3.options
        )
        with pytest.raises(InputError, match="no conditional writes"):
            run(job, in_process)
        assert not (s3.folder / "bucket" / "tables" / "t.lance" / "_versions").exists()


def test_moto_agrees(model_dir, tmp_path):
    """A second opinion: another server's idea of S3."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        options = {
            "aws_endpoint": f"http://{host}:{port}", "aws_allow_http": "true",
            "aws_access_key_id": "x", "aws_secret_access_key": "x", "aws_region": "us-east-1",
        }  # fmt: skip
        s3fs.S3FileSystem(key="x", secret="x", endpoint_url=options["aws_endpoint"]).mkdir("bucket")
        assert [c for c in examine(Location(TABLE, options)) if c.problem] == []
        corpus = write_corpus(tmp_path / "c.jsonl", make_texts(12))
        job = EncodeJob(
            inputs=(str(corpus),), uri=TABLE, model=str(model_dir), shard_size=5,
            storage_options=options,
        )  # fmt: skip
        assert run(job, in_process).num_rows == 12
        assert verify(TABLE, storage_options=options).num_problems == 0
    finally:
        server.stop()


def test_lost_replies_and_errors_change_nothing(s3, model_dir):
    corpus = put_corpus(s3, "f.jsonl", make_texts(30, seed=3))
    uri = "s3://bucket/tables/f.lance"
    job = EncodeJob(
        inputs=(corpus,), uri=uri, model=str(model_dir), shard_size=5, commit_every_s=0,
        storage_options=s3.options,
    )  # fmt: skip
    s3.faults(
        {"action": "lost_reply", "match": "^PUT .*(_versions|_transactions)", "count": 4},
        {"action": "error503", "match": "^(PUT|GET)", "probability": 0.05, "count": 20},
        {"action": "drop", "match": "^PUT", "probability": 0.05, "count": 5},
    )
    run(job, in_process)
    faults = s3.stats()["faults"]
    s3.faults()
    assert faults["lost_reply"] == 4, json.dumps(faults)
    ids = lance.dataset(uri, storage_options=s3.options).to_table(columns=["id"])["id"].to_pylist()
    assert ids == [f"p{i}" for i in range(30)]
    assert verify(uri, storage_options=s3.options).num_problems == 0
