"""How often shards are committed: the rule alone, and the rule at work on a real table."""

import json
from dataclasses import replace

import lance
import numpy as np
import pytest

from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import Reject
from pipeline.corpus.shards import plan_shards
from pipeline.messages import ShardResult
from pipeline.table.committer import COMMIT_SHARE, LONGEST_PAUSE_S, MOST_WAITING, Committer, pause_s
from pipeline.table.fragments import write_fragment
from pipeline.table.ledger import Ledger

SPEC = TableSpec("m", None, "f", dim=4, max_length=64, ratios=(2,), store_dtype="float32")


@pytest.mark.parametrize(
    ("every_s", "last_s", "pause"),
    [
        (10, 0.01, 10),  # a cheap commit: what the user asked for
        (10, 1, 25),  # 1 s in 26: at most COMMIT_SHARE
        (10, 1000, LONGEST_PAUSE_S),  # what a crash repeats stays bounded
        (600, 1000, 600),  # unless the user asked for more
        (0, 1, 0),  # each shard by itself
    ],
)
def test_the_pause_follows_the_cost_of_a_commit(every_s, last_s, pause):
    assert pause_s(every_s, last_s) == pause
    if every_s < pause < LONGEST_PAUSE_S:
        assert last_s / (last_s + pause) < COMMIT_SHARE


@pytest.fixture
def job(tmp_path):
    """A ledger of 6 shards of one row, and their results."""
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"id": f"r{i}", "text": "t"}) + "\n" for i in range(6)))
    plan = plan_shards(expand_inputs([str(file)], None), shard_size=1)
    uri = str(tmp_path / "t.lance")
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    results = []
    for i, shard in enumerate(plan.shards):
        states = [PassageStates(np.zeros((1, 4), np.float32), 2, False)]
        rows = build_rows(SPEC, [f"r{i}"], ["t"], PackedStates.of(states), shard.id)
        results.append(ShardResult(shard, write_fragment(rows, ledger.dataset), 1))
    return ledger, results


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self):
        return self.now


def test_shards_wait_for_the_next_commit_and_share_it(job):
    ledger, results = job
    clock = Clock()
    committer = Committer(ledger, 10, clock=clock)
    version = ledger.dataset.version
    for result in results[:3]:
        committer.add(result)
        clock.now += 1
        assert not committer.commit_if_due()
    clock.now += 8
    assert committer.commit_if_due()
    assert ledger.done == {0, 1, 2}
    assert ledger.dataset.version == version + 1
    committer.add(results[3])
    assert not committer.commit_if_due()
    assert committer.commit()  # whatever ends a run
    assert not committer.commit()
    assert lance.dataset(ledger.location.uri).count_rows() == 4 == ledger.num_rows


def test_a_slow_commit_makes_the_next_one_later(job, monkeypatch):
    ledger, results = job
    clock = Clock()
    committer = Committer(ledger, 10, clock=clock)
    real = ledger.commit

    def slow(waiting):
        real(waiting)
        clock.now += 2

    monkeypatch.setattr(ledger, "commit", slow)
    committer.add(results[0])
    clock.now += 10
    assert committer.commit_if_due()
    committer.add(results[1])
    clock.now += 49
    assert not committer.commit_if_due()
    clock.now += 1
    assert committer.commit_if_due()
    assert clock.now == 164


def test_what_waits_is_bounded_and_holds_no_rejects(job):
    ledger, results = job
    committer = Committer(ledger, 1e9, clock=Clock())
    rejects = (Reject("c.jsonl", 1, "bad"),) * 100
    committer.add(replace(results[0], rejects=rejects))
    assert committer.waiting[0].rejects == ()
    assert not committer.commit_if_due()
    empty = ShardResult(results[1].shard, None, 0)
    committer.waiting += [empty] * (MOST_WAITING - 1)
    assert committer.commit_if_due()
    assert ledger.done == {0, 1}
    assert committer.waiting == []


def test_what_a_ledger_counts_is_what_a_new_one_reads(job):
    """A ledger adds its own commits up instead of listing all fragments again."""
    ledger, results = job
    plan = plan_shards([results[0].shard.file], shard_size=1)
    for some in (
        results[:2],
        results[1:4],
        [*results[4:5], ShardResult(results[5].shard, None, 0)],
    ):
        ledger.commit(some)
        fresh = Ledger(ledger.location, plan)
        assert (ledger.done, ledger.num_rows) == (fresh.done, fresh.num_rows)
        assert ledger.dataset.version == fresh.dataset.version
        assert ledger.metadata == fresh.metadata
    ledger.seal()
