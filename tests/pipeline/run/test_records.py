"""Records of runs: complete, harmless, and drawn. A tiny model with random weights."""

import builtins
import json
import logging
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lance
import numpy as np
import pytest

from jobs.evaluation.run_figure import bin_records
from jobs.plan import plan
from jobs.status import draw, status
from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.table.location import Location
from pipeline.messages import Place
from pipeline.run import run_files
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.run.records import ShardRecord, read_records, totals
from pipeline.table import committer
from pipeline.table.side_files import RUNS
from pipeline.upkeep.facts import table_facts
from pipeline.upkeep.garbage import collect_garbage
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.commands import HANG_S
from tests.support.s3_server import serve


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("records") / "c.jsonl", make_texts(60, seed=8))


@pytest.fixture
def made(model_dir, corpus, tmp_path):
    """A table of six shards, and what its run said."""
    table = tmp_path / "t.lance"
    return table, encode_table(model_dir, corpus, table, shard_size=10)


def read_commits(uri) -> list[SimpleNamespace]:
    parts = sorted((Path(uri) / RUNS).iterdir())
    lines = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
    return [SimpleNamespace(**line) for line in lines if line.get("kind") == "commit"]


def test_the_records_add_up_to_the_table(made):
    table, summary = made
    records = read_records(Location(str(table)))
    assert [r.shard for r in records] == list(range(6))
    assert [r.at_s for r in records] == sorted(r.at_s for r in records)
    assert {"read", "tokenise", "forward", "write"} <= set(records[0].seconds)
    assert records[0].worker
    facts, found = table_facts(Location(str(table))), totals(records)
    assert (found.tokens, found.truncated) == (facts["tokens"], facts["truncated"])
    assert sum(r.rows for r in records) == facts["passages"] == 60
    assert found.padding == pytest.approx(summary.totals.padding)
    assert 0 < found.seconds <= summary.totals.seconds + 1


def test_device_threads_make_the_same_rows_and_share_one_clock(model_dir, corpus, tmp_path):
    rows = []
    for threads in (1, 3):
        uri = str(tmp_path / f"{threads}.lance")
        job = EncodeJob(
            inputs=(str(corpus),), uri=uri, model=str(model_dir), shard_size=30, token_budget=200
        )
        run(job, partial(in_process, place=Place(threads)))
        assert verify(uri).num_problems == 0
        rows.append(PassageTable.open(uri).take([f"p{i}" for i in range(60)]))
        found = totals(read_records(Location(uri)))
        device = sum(found.stages[stage] for stage in ("forward", "pool", "idle"))
        assert 0 < device <= found.seconds + 1
    for one, other in zip(*rows, strict=True):
        np.testing.assert_allclose(one.states, other.states, atol=2e-3)


def test_commits_are_recorded_with_what_waited_for_them(model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(committer, "MOST_WAITING", 4)
    uri = str(tmp_path / "t.lance")
    summary = encode_table(model_dir, corpus, uri, shard_size=10, commit_every_s=1e9)
    shards, commits = read_records(Location(uri)), read_commits(uri)
    assert [(c.shards, c.rows) for c in commits] == [(4, 40), (2, 20)]
    assert commits[0].version < commits[1].version <= lance.dataset(uri).version
    waited = [s.waited_s for s in shards]
    assert waited[:4] == sorted(waited[:4], reverse=True), "the first to come waits longest"
    assert all(s.at_s + s.waited_s <= commits[i // 4].at_s + 0.01 for i, s in enumerate(shards))
    spent = sum(c.seconds + c.results_s for c in commits)
    assert sum(c.results_s for c in commits) > 0, "the driver waits while shards are encoded"
    assert spent <= summary.totals.seconds


def test_records_of_an_earlier_release_are_read_and_drawn(made, tmp_path):
    table, _ = made
    old = {
        "run": "20260101T000000.000000Z-00000000", "at_s": 1.5, "shard": 0, "rows": 10,
        "rejected": 0, "tokens": 500, "padded_tokens": 520, "truncated": 0, "worker": "host:1",
        "seconds": {"read": 0.1, "tokenise": 0.1, "wait": 5.0, "forward": 1.0, "write": 0.1},
    }  # fmt: skip
    (table / RUNS / f"{old['run']}-00000.jsonl").write_text(json.dumps(old) + "\n")
    first = read_records(Location(str(table)))[0]
    assert (first.tokens, first.waited_s) == (500, None)
    assert first.worked_s == pytest.approx(1.3)
    assert "wait" not in bin_records([first]).seconds, "a busy device is no idleness"
    draw(tmp_path / "run.svg", Location(str(table)))
    assert b"<svg" in (tmp_path / "run.svg").read_bytes()


def test_a_resumed_job_adds_its_own_run(model_dir, corpus, tmp_path):
    uri = str(tmp_path / "t.lance")
    job = EncodeJob(
        inputs=(str(corpus),), uri=uri, model=str(model_dir), shard_size=10, commit_every_s=0
    )

    def stopped(config, shards):
        yield from in_process(config, shards[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(job, stopped)
    run(job, in_process)
    records = read_records(Location(uri))
    assert [r.shard for r in records] == list(range(6))
    assert len({r.run for r in records}) == totals(records).runs == 2
    run(job, in_process)  # nothing left to do: nothing to record
    assert read_records(Location(uri)) == records


def test_a_new_generation_forgets_the_runs_of_the_one_before(made, model_dir, corpus):
    table, _ = made
    encode_table(model_dir, corpus, table, shard_size=20, new_generation=True)
    assert [r.shard for r in read_records(Location(str(table)))] == [0, 1, 2]


def test_a_long_run_writes_parts_that_stay_small(model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(run_files, "PART_RECORDS", 4)
    table = tmp_path / "t.lance"
    encode_table(model_dir, corpus, table, shard_size=6, commit_every_s=0)
    parts = sorted((table / RUNS).iterdir())
    assert [len(part.read_text().splitlines()) for part in parts] == [4] * 5
    assert len(read_records(Location(str(table)))) == len(read_commits(table)) == 10


def test_records_are_written_at_most_every_so_often(model_dir, corpus, tmp_path, monkeypatch):
    written = []
    real = run_files.write_text

    def write_text(session, path, text):
        written.append(path)
        real(session, path, text)

    monkeypatch.setattr(run_files, "write_text", write_text)
    encode_table(model_dir, corpus, tmp_path / "t.lance", shard_size=6, commit_every_s=0)
    assert len([path for path in written if path.startswith(RUNS)]) == 1, (
        "ten commits within half a minute are one write, at the end"
    )


def test_records_are_written_while_the_run_goes_on(model_dir, corpus, tmp_path, monkeypatch):
    """So that a run that is killed loses only the latest."""
    monkeypatch.setattr(run_files, "RECORDS_EVERY_S", 0.0)
    monkeypatch.setattr(run_files, "WRITE_EVERY_S", 0.05)
    table = Location(str(tmp_path / "t.lance"))
    job = EncodeJob(
        inputs=(str(corpus),), uri=table.uri, model=str(model_dir), shard_size=10, commit_every_s=0
    )

    def waits(config, shards):
        yield from in_process(config, shards[:2])
        deadline = time.monotonic() + HANG_S
        while len(read_records(table)) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield from in_process(config, shards[2:])

    run(job, waits)
    assert [r.shard for r in read_records(table)] == list(range(6))


def test_verify_and_gc_leave_records_alone(made):
    table, _ = made
    before = read_records(Location(str(table)))
    collect_garbage(Location(str(table)), older_than=timedelta(0))
    assert verify(str(table)).num_problems == 0
    assert read_records(Location(str(table))) == before


def test_a_store_that_refuses_the_records_costs_a_warning(
    model_dir, corpus, tmp_path, caplog, made
):
    with serve(tmp_path / "s3") as s3:
        (s3.folder / "bucket" / "c.jsonl").write_bytes(corpus.read_bytes())
        s3.faults({"action": "error503", "match": "^PUT .*_kalm/runs", "count": 10_000})
        uri = "s3://bucket/t.lance"
        job = EncodeJob(
            inputs=("s3://bucket/c.jsonl",), uri=uri, model=str(model_dir), shard_size=10,
            storage_options=s3.options,
        )  # fmt: skip
        with caplog.at_level(logging.WARNING):
            assert run(job, in_process).live
        refused = sum(s3.stats()["faults"].values())
        s3.faults()
        assert refused and "the store refuses _kalm/runs" in caplog.text
        assert read_records(Location(uri, s3.options)) == []
        rows = lance.dataset(uri, version="live", storage_options=s3.options).to_table()
    assert rows.equals(lance.dataset(str(made[0]), version="live").to_table())


def test_records_live_on_an_object_store_too(model_dir, corpus, tmp_path):
    with serve(tmp_path / "s3") as s3:
        (s3.folder / "bucket" / "c.jsonl").write_bytes(corpus.read_bytes())
        uri = "s3://bucket/t.lance"
        job = EncodeJob(
            inputs=("s3://bucket/c.jsonl",), uri=uri, model=str(model_dir), shard_size=10,
            storage_options=s3.options,
        )  # fmt: skip
        run(job, in_process)
        assert len(read_records(Location(uri, s3.options))) == 6
        puts = [r for r in s3.stats()["requests"] if "PUT" in str(r) and "_kalm/runs" in str(r)]
        assert len(puts) == 1


@pytest.mark.parametrize("suffix", ["html", "svg", "png"])
def test_status_draws_the_runs(made, tmp_path, suffix, capsys):
    table, _ = made
    file = tmp_path / f"run.{suffix}"
    status(str(table), figure=file)
    raw = file.read_bytes()
    if suffix == "png":
        assert raw.startswith(b"\x89PNG")
        return
    assert b"<svg" in raw
    if suffix == "html":
        assert b"60 passages" in raw and b"6 shards, 1 worker, 1 run" in raw
        assert raw.count(b"<svg") == 1 and b"<?xml" not in raw


def test_the_figure_bins_lose_nothing_and_mark_a_resumed_run():
    records = [
        ShardRecord(run, float(i + 1), i, 10, 0, 100 + i, 120 + i, 0, {"forward": 2.0, "write": 1})
        for run in ("a", "b")
        for i in range(50)
    ]
    bins = bin_records(records)
    assert bins.tokens.sum() == sum(r.tokens for r in records)
    assert bins.padded.sum() == sum(r.padded_tokens for r in records)
    assert {k: v.sum() for k, v in bins.seconds.items()} == {"forward": 200.0, "write": 100.0}
    assert bins.restarts == [50.0]
    assert bins.edges[-1] == 100.0


def test_what_cannot_be_drawn_says_why(made, tmp_path, monkeypatch):
    table, _ = made
    with pytest.raises(InputError, match=r"must end in \.html, \.svg, \.png"):
        draw(tmp_path / "run.gif", Location(str(table)))
    for part in (table / RUNS).iterdir():
        part.unlink()
    with pytest.raises(InputError, match="has no run records"):
        draw(tmp_path / "run.svg", Location(str(table)))
    real = builtins.__import__

    def without_matplotlib(name, *rest):
        if name == "jobs.evaluation.run_figure":
            raise ModuleNotFoundError("no", name="matplotlib")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(InputError, match=r"needs matplotlib: pip install .*\[batch,eval\]"):
        draw(tmp_path / "run.svg", Location(str(table)))


def test_the_plan_is_compared_by_status(made, model_dir, corpus, tmp_path, capsys):
    table, _ = made
    plan([str(corpus)], str(model_dir), out=tmp_path / "p.json")
    capsys.readouterr()
    status(str(table), plan=tmp_path / "p.json", as_json=True)
    facts = json.loads(capsys.readouterr().out)
    lines = {x["name"]: x for x in facts["plan"]}
    assert facts["plan_hint"] is None
    assert lines["tokens"]["planned"] == lines["tokens"]["actual"]
    assert lines["tokens/s"]["planned"] is None
    status(str(table), plan=tmp_path / "p.json")
    assert "difference" in capsys.readouterr().out
    other = write_corpus(tmp_path / "other.jsonl", make_texts(500, seed=9))
    plan([str(other)], str(model_dir), out=tmp_path / "other.json")
    capsys.readouterr()
    status(str(table), plan=tmp_path / "other.json")
    shown = capsys.readouterr().out
    assert "the estimate is for 500 passages, the table was made from 60 rows" in shown
    assert "estimate of another corpus" in shown
    with pytest.raises(InputError, match="cannot read the estimate"):
        status(str(table), plan=Path("none.json"))
