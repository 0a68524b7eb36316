"""A run seen from beside: `kalm status --watch` and the file it reads."""

import io
import json
import logging
import os
import signal
import time

import lance
import pytest
from rich.console import Console

from jobs.watch import SILENT_AFTER_S, _redraw, line, screen_of, watch
from kalm_encoder.errors import FencedError, IncompleteError, InputError, KalmError
from kalm_encoder.table.location import Location
from pipeline.run import run_files
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.run.records import read_records
from pipeline.run.run_files import RunFiles, read_view
from pipeline.table.side_files import RUN_VIEW
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.commands import HANG_S, Command, kalm
from tests.support.s3_server import serve

ROWS = 600


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("watch") / "c.jsonl", make_texts(ROWS, seed=21))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("watch") / "s.jsonl", make_texts(60, seed=22))


def encode(corpus, table, model_dir):
    return Command(
        "encode", corpus, "--to", table, "--model", model_dir, "--shard-size", 25,
        "--workers", 0, "--commit-every", 0.1,
    )  # fmt: skip


def wait_for_a_shard(table, process):
    deadline = time.monotonic() + HANG_S
    while not (table / "_versions").exists() or not lance.dataset(str(table)).get_fragments():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_a_run_is_watched_from_beside_until_it_ends(corpus, model_dir, tmp_path):
    table = tmp_path / "t.lance"
    run_of = encode(corpus, table, model_dir)
    watches = [
        Command("status", table, "--watch", "--interval", 0.2, *form) for form in ([], ["--json"])
    ]
    (text, _), (lines, errors) = (w.communicate(timeout=HANG_S) for w in watches)
    assert [w.returncode for w in watches] == [0, 0], errors
    assert run_of.wait(HANG_S) == 0
    seen = [json.loads(one) for one in lines.splitlines()]
    assert {s["run"] for s in seen} == {r.run for r in read_records(Location(str(table)))}
    assert "encoding" in {s["state"] for s in seen}, "it ended before anybody looked"
    assert [s["shards_done"] for s in seen] == sorted(s["shards_done"] for s in seen)
    assert all(s["silent_s"] is None and s["pid"] == run_of.pid for s in seen)
    last = seen[-1]
    assert (last["state"], last["rows_done"], last["shards_done"]) == ("complete", ROWS, ROWS // 25)
    assert last["commits"] > 1 and last["eta_s"]["value"] == 0
    (worker,) = last["workers"]
    assert worker["worker"].endswith(f":{run_of.pid}")
    assert worker["shards"] == last["shards"] and worker["seconds"]["forward"] > 0
    assert 0 < worker["device_busy"] <= 1
    assert 0.5 * last["elapsed_s"] < last["results_s"] <= last["elapsed_s"]
    assert text.splitlines()[-1].startswith(line(last)[:8])
    assert "complete, 600 of 600 passages, 24 of 24 shards" in text.splitlines()[-1]


def test_a_killed_run_is_said_to_be_silent_and_a_resumed_one_is_seen(corpus, model_dir, tmp_path):
    table = tmp_path / "t.lance"
    run_of = encode(corpus, table, model_dir)
    wait_for_a_shard(table, run_of)
    os.kill(run_of.pid, signal.SIGKILL)
    run_of.wait(HANG_S)
    seen = read_view(Location(str(table)))
    beside = Command("status", table, "--watch", "--interval", 0.2, "--json")
    out, errors = beside.communicate(timeout=HANG_S)
    assert beside.returncode == 1
    assert f"process {run_of.pid} on {seen['host']} died" in errors
    assert "has written nothing for 1" in errors  # 15 s or a little more
    last = json.loads(out.splitlines()[-1])
    assert last["silent_s"] >= SILENT_AFTER_S and last["state"] == "encoding"
    # The run that takes the work up counts what was there, and has a name of its own.
    again = encode(corpus, table, model_dir)
    assert again.wait(HANG_S) == 0
    resumed = read_view(Location(str(table)))
    assert resumed["state"] == "complete" and resumed["run"] != seen["run"]
    assert resumed["rows_done"] == ROWS
    assert sum(w["shards"] for w in resumed["workers"]) < resumed["shards"]


def test_a_run_says_how_it_ended(small, model_dir, tmp_path):
    uri = str(tmp_path / "t.lance")
    job = EncodeJob(inputs=(str(small),), uri=uri, model=str(model_dir), shard_size=10)

    def ends(error):
        def execute(config, shards):
            yield from in_process(config, shards[:1])
            raise error

        with pytest.raises(type(error)):
            run(job, execute)
        return read_view(Location(uri))

    assert ends(KeyboardInterrupt())["state"] == "stopped"
    failed = ends(IncompleteError("2 shards failed"))
    assert (failed["state"], failed["reason"]) == ("failed", "2 shards failed")
    # One that was fenced off is silent: another speaks there by then.
    assert ends(FencedError("another command took it"))["state"] == "encoding"
    assert run(job, in_process).live
    assert read_view(Location(uri))["state"] == "complete"
    before = read_view(Location(uri))
    run(job, in_process)  # nothing to do, nothing to say
    assert read_view(Location(uri)) == before


def test_a_store_that_refuses_costs_one_warning(small, model_dir, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(run_files, "WRITE_EVERY_S", 0.1)
    with serve(tmp_path / "s3") as s3:
        (s3.folder / "bucket" / "c.jsonl").write_bytes(small.read_bytes())
        s3.faults({"action": "error503", "match": f"^PUT (?!.*probe).*{RUN_VIEW}", "count": 10_000})
        with caplog.at_level(logging.WARNING):
            encode_table(
                model_dir, "s3://bucket/c.jsonl", "s3://bucket/t.lance", shard_size=10,
                storage_options=s3.options,
            )  # fmt: skip
        refused = sum(s3.stats()["faults"].values())
        s3.faults()
        assert refused > 1
        assert caplog.text.count("the store refuses") == 1
        assert read_view(Location("s3://bucket/t.lance", s3.options)) is None


def test_a_run_on_an_object_store_is_watched_too(small, model_dir, tmp_path):
    with serve(tmp_path / "s3") as s3:
        (s3.folder / "bucket" / "c.jsonl").write_bytes(small.read_bytes())
        encode_table(
            model_dir, "s3://bucket/c.jsonl", "s3://bucket/t.lance", storage_options=s3.options
        )
        done = kalm("status", "s3://bucket/t.lance", "--watch", "--json", *s3.arguments, check=0)
    (only,) = map(json.loads, done.stdout.splitlines())
    assert (only["state"], only["rows_done"]) == ("complete", 60)


def test_a_terminal_shows_each_worker_with_its_stages(small, model_dir, tmp_path, capsys):
    encode_table(model_dir, small, tmp_path / "t.lance", shard_size=10)
    seen = read_view(Location(str(tmp_path / "t.lance")))
    screen = io.StringIO()
    Console(file=screen, width=160).print(screen_of(seen))
    drawn = screen.getvalue()
    assert "complete" in drawn and seen["run"] in drawn and "60 of 60 passages" in drawn
    header, row = (
        x for x in drawn.splitlines() if x.startswith(("worker ", seen["workers"][0]["worker"]))
    )
    assert header.split()[:4] == ["worker", "shards", "tokens/s", "device"]
    assert "forward s" in header and "write s" in header
    assert row.split()[:2] == [seen["workers"][0]["worker"], "6"]
    many = {**seen, "workers": seen["workers"] * 50, "num_workers": 70}
    Console(file=screen, width=160).print(screen_of(many))
    assert "and 40 more" in screen.getvalue()
    _redraw(iter([seen]))
    assert "60 of 60 passages" in capsys.readouterr().out


def test_watching_refuses_what_cannot_be(small, model_dir, tmp_path):
    encode_table(model_dir, small, tmp_path / "t.lance")
    done = kalm("status", tmp_path / "t.lance", "--watch", "--interval", 0, check=2)
    assert "--interval 0.0 must be more than 0 seconds" in done.stderr
    done = kalm("status", tmp_path / "t.lance", "--watch", "--figure", "run.svg", check=2)
    assert "without --plan and --figure" in done.stderr


def test_an_old_file_is_looked_at_twice_before_the_run_is_called_silent(
    small, model_dir, tmp_path, monkeypatch, capsys
):
    """Clocks of two machines differ: a file that still changes is no silent run."""
    uri = str(tmp_path / "t.lance")
    encode_table(model_dir, small, uri)
    monkeypatch.setattr(run_files, "WRITE_EVERY_S", 0.2)
    monkeypatch.setattr("jobs.watch.SILENT_AFTER_S", 1.0)
    file = tmp_path / "t.lance" / RUN_VIEW
    old = {
        **read_view(Location(uri)),
        "state": "encoding",
        "updated_at": "2020-01-01T00:00:00.000+00:00",
    }
    file.write_text(json.dumps(old))
    with pytest.raises(KalmError, match="has written nothing for"):
        watch(Location(uri), interval_s=0.05, as_json=True)
    shown = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert [s["silent_s"] is None for s in shown] == [True] * (len(shown) - 1) + [False]
    assert len(shown) > 2
    RunFiles(Location(uri), "run", lambda: {**old, "state": "complete"}).write_view()
    watch(Location(uri), interval_s=0.05, as_json=False)
    assert "complete, 60 of 60 passages" in capsys.readouterr().out


def test_watching_a_table_that_nobody_encodes_ends(tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.watch.APPEARS_WITHIN_S", 0.2)
    with pytest.raises(InputError, match=r"no run has written to .*t\.lance"):
        watch(Location(str(tmp_path / "t.lance")), interval_s=0.05, as_json=False)
