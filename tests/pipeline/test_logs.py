"""What is logged: real commands, every line of theirs, in this process and on Ray's workers."""

import contextvars
import json
import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from kalm_encoder import PassageTable
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.table.location import Location
from pipeline import logs
from pipeline.logs import JsonFormatter, LogOptions, TextFormatter
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.run.records import read_records
from pipeline.run.run_files import read_view
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus
from tests.support.commands import HANG_S, kalm


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("logs") / "c.jsonl", make_texts(60, seed=31))


def arguments(corpus, table, model_dir, *more):
    return ["encode", corpus, "--to", table, "--model", model_dir, "--shard-size", 10, *more]


def check_lines(stderr, table):
    """Every line is an object of known fields with the run; return them."""
    lines = [json.loads(line) for line in stderr.splitlines()]
    (run_id,) = {record.run for record in read_records(Location(str(table)))}
    for line in lines:
        assert set(line) <= {"time", "level", "logger", "message", *logs.FIELDS, "exception"}
        assert line["time"].endswith("+00:00")
        assert line["run"] == run_id, line
    return lines


def test_every_line_of_a_command_is_json_with_its_run(corpus, model_dir, tmp_path):
    table = tmp_path / "t.lance"
    done = kalm(
        "--debug", "--log-format", "json", *arguments(corpus, table, model_dir, "--workers", 0),
        check=0,
    )  # fmt: skip
    lines = check_lines(done.stderr, table)
    assert any("60 rows in 6 shards, 0 done, 6 to do" in line["message"] for line in lines)
    shards = [line["shard"] for line in lines if "tokens in" in line["message"]]
    assert sorted(shard[:6] for shard in shards) == [f"{i:06d}" for i in range(6)]


def test_lines_of_ray_workers_come_in_the_same_form_and_no_users_folder_shadows_ours(
    corpus, model_dir, tmp_path
):
    """Ray puts the working directory first on its workers' path."""
    for package in ("pipeline", "kalm_encoder"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    table = tmp_path / "t.lance"
    # The installed `kalm` script, unlike `python -m`, does not put the folder on the path itself.
    script = "import sys; sys.path.remove(''); from jobs.cli import main; main()"
    command = arguments(corpus, table, model_dir, "--workers", 2, "--cpus-per-worker", 1)
    done = subprocess.run(
        [sys.executable, "-c", script, "--debug", "--log-format", "json", *map(str, command)],
        cwd=tmp_path, capture_output=True, text=True, timeout=HANG_S,
        env={**os.environ, "PYTHONPATH": os.getcwd(), "OTEL_TRACES_EXPORTER": "console"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(PassageTable.open(str(table))) == 60
    lines = check_lines(done.stderr, table)
    workers = {record.worker for record in read_records(Location(str(table)))}
    of_workers = [line for line in lines if "worker" in line]
    assert workers <= {line["worker"] for line in of_workers}
    assert {worker["worker"] for worker in read_view(Location(str(table)))["workers"]} == workers
    loaded = [line for line in of_workers if line["message"].startswith("loaded ")]
    assert loaded and all(line["level"] == "INFO" for line in loaded)
    encoded = {line["shard"][:6] for line in of_workers if "shard" in line}
    # Of a cluster that goes down at once the last lines may be lost.
    assert encoded and encoded <= {f"{i:06d}" for i in range(6)}
    assert any(line["logger"] == "pipeline.run.driver" for line in lines if "worker" not in line)
    # The driver records the shards of all workers, and their lines have the id of its trace.
    (trace,) = {line["trace"] for line in lines if line["logger"].startswith("pipeline.")}
    assert set(re.findall(r'"trace_id": "0x(\w+)"', done.stdout)) == {trace}
    assert done.stdout.count('"name": "shard"') == 6
    assert set(re.findall(r'"kalm.worker": "(.+)"', done.stdout)) == workers


def test_errors_are_lines_too(model_dir, tmp_path):
    done = kalm(
        "--log-format", "json",
        *arguments("missing.jsonl", tmp_path / "t.lance", model_dir, "--workers", 0), check=2,
    )  # fmt: skip
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["logger"]) == ("ERROR", "kalm")
    assert line["message"].startswith("error: ") and "missing.jsonl" in line["message"]
    done = kalm("--log-format", "xml", "status", "t.lance", check=2)
    assert "--log-format 'xml' is not one of text, json" in done.stderr


def test_text_lines_end_with_what_is_known(corpus, model_dir, tmp_path):
    table = tmp_path / "t.lance"
    done = kalm(*arguments(corpus, table, model_dir, "--workers", 0), check=0)
    (run_id,) = {record.run for record in read_records(Location(str(table)))}
    assert done.stderr.splitlines()
    assert all(line.endswith(f" run={run_id}") for line in done.stderr.splitlines())


def test_a_failing_passage_is_logged_with_its_shard(
    corpus, model_dir, tmp_path, caplog, monkeypatch
):
    """The warning comes from the device's thread, which works for all shards."""
    real = PassageEncoder.start

    def fails_on_long_ones(self, passages, **options):
        if len(passages) > 1 and max(len(p.ids) for p in passages) > 100:
            raise RuntimeError("this batch is too much")
        return real(self, passages, **options)

    monkeypatch.setattr(PassageEncoder, "start", fails_on_long_ones)
    caplog.handler.setFormatter(JsonFormatter())
    uri = str(tmp_path / "t.lance")
    job = EncodeJob(inputs=(str(corpus),), uri=uri, model=str(model_dir), shard_size=10)
    assert run(job, in_process).num_rows == 60
    told = [json.loads(one) for one in caplog.text.splitlines() if "trying its halves" in one]
    assert told and all(line["shard"] for line in told)
    assert {line["run"] for line in told} == {r.run for r in read_records(Location(uri))}


def test_exceptions_and_threads_keep_their_place():
    record = logging.LogRecord("a.b", logging.ERROR, "f.py", 1, "broke %s", ("x",), None)
    try:
        raise ValueError("with\na line break")
    except ValueError:
        record.exc_info = sys.exc_info()
    with logs.in_run() as run_id, logs.in_shard("000003-abc"):
        with logs.in_run() as inner:
            assert inner == run_id, "a run within a run is the same run"
        context = contextvars.copy_context()
        with ThreadPoolExecutor(1) as pool:
            one = pool.submit(context.run, JsonFormatter().format, record).result()
        text = TextFormatter().format(record)
    assert "\n" not in one
    line = json.loads(one)
    assert (line["run"], line["shard"], line["message"]) == (run_id, "000003-abc", "broke x")
    assert "ValueError: with" in line["exception"]
    assert text.splitlines()[0].endswith(f"a.b: broke x run={run_id} shard=000003-abc")
    assert "Traceback" in text
    assert "run" not in json.loads(JsonFormatter().format(record)), "outside of a run"


def test_a_line_may_name_its_shard_itself():
    record = logging.makeLogRecord({"msg": "m", "shard": "000009-x"})
    assert json.loads(JsonFormatter().format(record))["shard"] == "000009-x"
    assert LogOptions() == logs.current(), "tests before this one left a run behind"
