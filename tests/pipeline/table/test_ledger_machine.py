"""Any interleaving of drivers, crashes and changes keeps the table what the corpus says."""

import shutil
import tempfile
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kalm_encoder.errors import FencedError, KalmError
from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import InputFile, RowRange
from pipeline.corpus.passages import Fields
from pipeline.corpus.shards import Plan, Shard
from pipeline.messages import ShardResult
from pipeline.table.claim import COMPLETE, LOADING
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_fragment
from pipeline.table.ledger import Ledger
from pipeline.table.publish import publish
from pipeline.table.steps import Steps
from pipeline.upkeep.delete import compact
from pipeline.workers.local import in_process

SPEC = TableSpec("m", None, "f", dim=4, max_length=64, ratios=(2,), store_dtype="float32")
SHARDS, ROWS = 4, 2


def make_plan(generation):
    """Four shards of two rows; another plan for each generation."""
    shards = [
        Shard(
            n,
            InputFile("c", "jsonl"),
            Fields("id", "text"),
            RowRange(n, 1, n, ROWS, f"{generation:012d}{n:020d}"),
        )
        for n in range(SHARDS)
    ]
    return Plan(tuple(shards))


def rows_of(ids, value):
    passages = [PassageStates(np.full((1, 4), value, np.float32), 2, False)] * len(ids)
    return build_rows(SPEC, ids, [f"text {value}"] * len(ids), PackedStates.of(passages), "s")


class LedgerMachine(RuleBasedStateMachine):
    """`corpus` is what readers must see: id to value; None before the first publish."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.uri = str(self.folder / "t.lance")
        self.generation = 1
        self.plan = make_plan(1)
        self.ledgers = [Ledger.begin(Location(self.uri), SPEC, self.plan)]
        self.zombies = []
        self.corpus = None
        self.coming = self.planned()
        self.value = 100
        self.unfinished = None

    def teardown(self):
        shutil.rmtree(self.folder, ignore_errors=True)

    def planned(self):
        return {f"r{n}-{i}": self.generation for n in range(SHARDS) for i in range(ROWS)}

    def state(self):
        return self.ledger_at().state

    def ledger_at(self):
        return Ledger(Location(self.uri), self.plan)

    def encode(self, number):
        rows = rows_of([f"r{number}-{i}" for i in range(ROWS)], self.generation)
        fragment = write_fragment(rows, lance.dataset(self.uri))
        return ShardResult(self.plan.shards[number], fragment, ROWS)

    @precondition(lambda self: self.state() == LOADING)
    @rule(numbers=st.sets(st.integers(0, SHARDS - 1), min_size=1))
    def commit(self, numbers):
        self.ledgers[-1].commit([self.encode(n) for n in sorted(numbers)])

    @precondition(lambda self: self.state() == LOADING)
    @rule()
    def written_but_never_committed(self):
        self.encode(0)

    @precondition(lambda self: self.state() == LOADING)
    @rule()
    def take_over(self):
        self.zombies.append(self.ledgers[-1])
        self.ledgers.append(Ledger.begin(Location(self.uri), SPEC, self.plan))

    @precondition(lambda self: self.state() == LOADING)
    @rule(number=st.integers(0, SHARDS - 1))
    def crash_before_commit_and_resume(self, number):
        self.encode(number)
        self.ledgers = [Ledger.begin(Location(self.uri), SPEC, self.plan)]

    @precondition(lambda self: self.zombies)
    @rule(number=st.integers(0, SHARDS - 1))
    def zombie_commits(self, number):
        zombie = self.zombies[-1]
        if zombie._plan is not self.plan:
            return
        before = lance.dataset(self.uri).count_rows()
        done = zombie.done
        try:
            zombie.commit([self.encode(number)])
        except FencedError:
            pass
        else:
            assert number in done, "a fenced driver added rows"
        assert lance.dataset(self.uri).count_rows() == before

    @precondition(lambda self: self.state() == LOADING)
    @rule()
    def seal(self):
        ledger = self.ledgers[-1]
        if len(ledger.done) < SHARDS:
            with pytest.raises(KalmError, match="cannot be sealed"):
                ledger.seal()
        else:
            ledger.seal()

    @precondition(lambda self: self.state() != LOADING and self.unfinished is None)
    @rule()
    def finish(self):
        SealedTable(Location(self.uri)).finish(Steps(in_process))

    @precondition(lambda self: self.state() == COMPLETE)
    @rule()
    def publish(self):
        publish(Location(self.uri))
        self.corpus = dict(self.coming)

    @precondition(lambda self: self.state() == COMPLETE)
    @rule()
    def compact(self):
        compact(Location(self.uri))
        self.corpus = dict(self.coming)

    @precondition(lambda self: self.state() != LOADING and self.state() != "sealed")
    @rule(
        changed=st.sets(st.integers(0, 3)), new=st.integers(0, 2), gone=st.sets(st.integers(0, 7)),
        crash_after=st.integers(0, 5),
    )  # fmt: skip
    def sync(self, changed, new, gone, crash_after):
        """Replace, add and delete rows; perhaps stop after some step and let a later one finish."""
        if self.unfinished is None:
            self.value += 1
            ids = sorted(self.coming)
            upserts = [i for n, i in enumerate(ids) if n in changed]
            upserts += [f"new{self.value}-{n}" for n in range(new)]
            deletes = [i for n, i in enumerate(ids) if n in gone and i not in upserts]
            self.unfinished = (upserts, deletes, self.value)
        upserts, deletes, value = self.unfinished
        writer = SealedTable(Location(self.uri))
        writer.begin_change()
        if crash_after == 0:
            return
        if upserts:
            staged = Location(f"{self.uri}-staged-{value}-{crash_after}.lance")
            lance.write_dataset(rows_of(upserts, value), staged.uri, mode="overwrite")
            writer.retry(lambda: writer.merge(Steps(in_process), [staged]))
        if crash_after == 1:
            return
        wanted = pc.field("id").isin(pa.array(deletes, pa.string()))
        scanner = writer.dataset.scanner(columns=["id"], with_row_id=True, filter=wanted)
        found = scanner.to_table()
        writer.retry(lambda: writer.delete(found["_rowid"].to_pylist()))
        if crash_after == 2:
            return
        writer.finish(Steps(in_process), compact=False)
        if crash_after > 3:
            publish(Location(self.uri))
        self.coming.update(dict.fromkeys(upserts, value))
        for id in deletes:
            del self.coming[id]
        self.unfinished = None
        if crash_after > 3:
            self.corpus = dict(self.coming)

    @precondition(lambda self: self.state() == COMPLETE)
    @rule()
    def new_generation(self):
        if self.corpus is None:
            return
        self.generation += 1
        self.plan = make_plan(self.generation)
        self.ledgers = [Ledger.begin(Location(self.uri), SPEC, self.plan, new_generation=True)]
        self.coming = self.planned()

    @invariant()
    def readers_see_the_corpus(self):
        dataset = lance.dataset(self.uri)
        if self.corpus is None:
            assert "live" not in dataset.tags.list()
            return
        rows = lance.dataset(self.uri, version="live").to_table(columns=["id", "states_r2"])
        ids = rows["id"].to_pylist()
        assert len(ids) == len(set(ids))
        values = [int(states[0][0]) for states in rows["states_r2"].to_pylist()]
        assert dict(zip(ids, values, strict=True)) == self.corpus

    @invariant()
    def no_id_is_there_twice(self):
        ids = lance.dataset(self.uri).to_table(columns=["id"])["id"].to_pylist()
        assert len(ids) == len(set(ids))


LedgerMachine.TestCase.settings = settings(
    stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
TestLedgerMachine = LedgerMachine.TestCase
