"""Two commands on one table at once: one result, and the loser says why it stops."""

import os
import signal
import time

import lance
import pytest

from kalm_encoder.errors import FencedError
from kalm_encoder.table.location import Location
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.finish import SealedTable
from pipeline.table.steps import Steps
from pipeline.upkeep.sync import sync
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus
from tests.support.commands import HANG_S, Command

ROWS = 1500


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("two") / "c.jsonl", make_texts(ROWS, seed=11))


def start(corpus, table, model_dir):
    return Command(
        "encode", corpus, "--to", table, "--model", model_dir, "--shard-size", 25,
        "--workers", 0, "--commit-every", 0,
    )  # fmt: skip


def assert_right(table):
    ids = lance.dataset(str(table), version="live").to_table(columns=["id"])["id"].to_pylist()
    assert ids == [f"p{i}" for i in range(ROWS)]
    assert verify(str(table)).num_problems == 0


def test_two_drivers_started_at_once(corpus, model_dir, tmp_path):
    table = tmp_path / "t.lance"
    both = [start(corpus, table, model_dir) for _ in range(2)]
    ends = [(p.communicate(timeout=HANG_S), p.returncode) for p in both]
    codes = sorted(code for _, code in ends)
    assert codes in ([0, 0], [0, 1]), ends
    for (_, stderr), code in ends:
        if code:
            assert "another command took" in stderr and "this one stops" in stderr
    assert_right(table)


def test_a_stopped_driver_that_wakes_up_is_fenced(corpus, model_dir, tmp_path):
    table = tmp_path / "t.lance"
    first = start(corpus, table, model_dir)
    deadline = time.monotonic() + HANG_S
    while not (table / "_versions").exists() or not lance.dataset(str(table)).get_fragments():
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(corpus, table, model_dir)
    _, stderr = second.communicate(timeout=HANG_S)
    assert second.returncode == 0, stderr
    os.kill(first.pid, signal.SIGCONT)
    _, stderr = first.communicate(timeout=HANG_S)
    assert first.returncode == 1, stderr
    assert "another command took" in stderr
    assert_right(table)


def test_a_sync_of_a_table_that_changed_meanwhile_stops(model_dir, tmp_path):
    """What it would write was compared with rows that are no longer there."""
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(10))
    job = EncodeJob(inputs=(str(corpus),), uri=str(tmp_path / "t.lance"), model=str(model_dir))
    run(job, in_process)
    write_corpus(corpus, ["changed", *make_texts(10)[1:]])

    def meanwhile(config, shards):
        yield from in_process(config, shards)
        other = SealedTable(Location(job.uri))
        other.begin_change(rows=False)
        other.finish(Steps(in_process))

    with pytest.raises(FencedError):
        sync(job, meanwhile)
    sync(job, in_process)
    assert verify(job.uri).num_problems == 0
