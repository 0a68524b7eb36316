"""The commit protocol on a real Lance table, with stand-in states and no model."""

import json

import lance
import numpy as np
import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import FencedError, InputError, KalmError, MismatchError, TableError
from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.shards import Plan, plan_shards
from pipeline.messages import ShardResult
from pipeline.table import claim, finish
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_fragment
from pipeline.table.ledger import Ledger
from pipeline.table.preflight import examine
from pipeline.table.publish import publish
from pipeline.table.steps import Steps
from pipeline.upkeep.delete import compact
from pipeline.workers.local import in_process

SPEC = TableSpec("m", None, "f", dim=4, max_length=64, ratios=(2,), store_dtype="float32")


@pytest.fixture
def plan(tmp_path) -> Plan:
    """5 shards of 3 rows."""
    file = tmp_path / "c.jsonl"
    file.write_text("".join(json.dumps({"id": f"r{i}", "text": "t"}) + "\n" for i in range(15)))
    return plan_shards(expand_inputs([str(file)], None), shard_size=3)


@pytest.fixture
def uri(tmp_path) -> str:
    return str(tmp_path / "t.lance")


def encode(plan: Plan, uri: str, number: int) -> ShardResult:
    """What a worker returns, with made-up states."""
    ids = [f"r{i}" for i in range(number * 3, number * 3 + 3)]
    passages = [PassageStates(np.full((1, 4), number, np.float32), 2, False)] * 3
    rows = build_rows(SPEC, ids, ["t"] * 3, PackedStates.of(passages), plan.shards[number].id)
    return ShardResult(plan.shards[number], write_fragment(rows, lance.dataset(uri)), 3)


def ids_of(uri: str) -> list[str]:
    return lance.dataset(uri).to_table(columns=["id"])["id"].to_pylist()


def test_shards_are_committed_once_and_in_plan_order(plan, uri):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    for number in (3, 0, 4, 1, 2):
        ledger.commit([encode(plan, uri, number)])
    ledger.seal()
    SealedTable(Location(uri)).finish(Steps(in_process))
    publish(Location(uri))
    assert ids_of(uri) == [f"r{i}" for i in range(15)]
    assert len(PassageTable.open(uri).take([f"r{i}" for i in range(15)])) == 15


def test_a_shard_that_is_there_is_not_added_again(plan, uri):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, 0)])
    ledger.commit([encode(plan, uri, 0), encode(plan, uri, 1)])
    assert ids_of(uri) == [f"r{i}" for i in range(6)]


def test_the_store_itself_refuses_a_second_commit_of_a_shard(plan, uri):
    """Even a driver that forgot what it committed cannot double a shard."""
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, 0)])
    ledger.done.clear()
    ledger.commit([encode(plan, uri, 0)])  # refused by Lance, then found to be there
    assert ids_of(uri) == ["r0", "r1", "r2"]
    assert ledger.done == {0}


def test_a_second_driver_takes_over_and_fences_the_first(plan, uri):
    first = Ledger.begin(Location(uri), SPEC, plan)
    first.commit([encode(plan, uri, 0)])
    stale = encode(plan, uri, 1)
    second = Ledger.begin(Location(uri), SPEC, plan)
    assert second.done == {0}
    with pytest.raises(FencedError, match="another command took"):
        first.commit([stale])
    second.commit([encode(plan, uri, 1)])
    with pytest.raises(FencedError):
        first.commit([encode(plan, uri, 2)])
    assert ids_of(uri) == [f"r{i}" for i in range(6)]


@pytest.mark.parametrize("applied", [True, False])
def test_an_unknown_outcome_is_settled_by_the_table(plan, uri, monkeypatch, applied):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, 0)])
    real, calls = lance.LanceDataset.commit, []

    def lost_reply(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            if applied:
                real(*args, **kwargs)
            raise OSError("connection reset")
        return real(*args, **kwargs)

    monkeypatch.setattr(lance.LanceDataset, "commit", lost_reply)
    ledger.commit([encode(plan, uri, 1), encode(plan, uri, 2)])
    assert len(calls) == (1 if applied else 2)
    ledger.commit([encode(plan, uri, 3)])
    assert ids_of(uri) == [f"r{i}" for i in range(12)]


def test_a_lost_reply_and_a_takeover_end_in_a_fence(plan, uri, monkeypatch):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    real = lance.LanceDataset.commit

    def taken_over(*args, **kwargs):
        monkeypatch.setattr(lance.LanceDataset, "commit", real)
        Ledger.begin(Location(uri), SPEC, plan)
        raise OSError("connection reset")

    result = encode(plan, uri, 0)
    monkeypatch.setattr(lance.LanceDataset, "commit", taken_over)
    with pytest.raises(FencedError):
        ledger.commit([result])
    assert ids_of(uri) == []


def test_a_store_that_keeps_refusing_is_an_error(plan, uri, monkeypatch):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    result = encode(plan, uri, 0)

    def refuse(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(lance.LanceDataset, "commit", refuse)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between one attempt and the next
    with pytest.raises(OSError, match="no space left"):
        ledger.commit([result])


@pytest.mark.parametrize("comes_back", [True, False])
def test_a_store_that_is_away_is_waited_for(plan, uri, monkeypatch, comes_back):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    result = encode(plan, uri, 0)
    failures = [OSError("connection reset")] + [TableError("no answer")] * (3 if comes_back else 99)

    def fails_first(real):
        def attempt(*args, **kwargs):
            if failures:
                raise failures.pop(0)
            return real(*args, **kwargs)

        return attempt

    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr(lance.LanceDataset, "commit", fails_first(lance.LanceDataset.commit))
    monkeypatch.setattr(claim, "open_to_write", fails_first(claim.open_to_write))
    if comes_back:
        ledger.commit([result])
        assert ids_of(uri) == ["r0", "r1", "r2"]
    else:
        with pytest.raises(OSError, match="connection reset"):
            ledger.commit([result])


def test_shards_without_a_usable_row_count_as_done(plan, uri):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([ShardResult(plan.shards[1], None, 0), encode(plan, uri, 0)])
    ledger.commit([ShardResult(plan.shards[2], None, 0)])
    assert Ledger.begin(Location(uri), SPEC, plan).done == {0, 1, 2}


def test_an_incomplete_table_cannot_be_sealed_or_opened(plan, uri):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, 0)])
    with pytest.raises(KalmError, match=r"cannot be sealed: shards missing \[1, 2, 3, 4\]"):
        ledger.seal()
    with pytest.raises(InputError, match="is not complete yet"):
        PassageTable.open(uri)
    assert len(PassageTable.open(uri, version=lance.dataset(uri).version).take(["r1"])) == 1


def test_a_sealed_table_takes_no_more(plan, uri):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, n) for n in range(5)])
    stale = Ledger.begin(Location(uri), SPEC, plan)
    stale.seal()
    with pytest.raises(FencedError):
        ledger.seal()
    again = Ledger.begin(Location(uri), SPEC, plan)
    assert again.sealed
    assert again.done == set(range(5))


@pytest.mark.parametrize(("large", "left"), [(1, 5), (finish.LARGE_FRAGMENT_BYTES, 1)])
def test_only_small_fragments_are_merged(plan, uri, monkeypatch, large, left):
    monkeypatch.setattr(finish, "LARGE_FRAGMENT_BYTES", large)
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    for n in range(5):
        ledger.commit([encode(plan, uri, n)])
    ledger.seal()
    SealedTable(Location(uri)).finish(Steps(in_process))
    publish(Location(uri))
    assert len(lance.dataset(uri).get_fragments()) == left
    assert len(PassageTable.open(uri).take([f"r{i}" for i in range(15)])) == 15
    compact(Location(uri))  # who asks for it gets it
    assert len(lance.dataset(uri).get_fragments()) == 1


def test_many_fragments_are_merged_some_at_a_time_in_order(plan, uri, monkeypatch):
    monkeypatch.setattr(finish, "COMPACT_AT_ONCE", 3)
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, n) for n in range(5)])
    ledger.seal()
    before = lance.dataset(uri).to_table()
    SealedTable(Location(uri)).finish(Steps(in_process))
    assert [f.count_rows() for f in lance.dataset(uri).get_fragments()] == [9, 6]
    assert lance.dataset(uri).to_table().equals(before)


def test_publishing_twice_changes_nothing(plan, uri):
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    ledger.commit([encode(plan, uri, n) for n in range(5)])
    ledger.seal()
    SealedTable(Location(uri)).finish(Steps(in_process))
    publish(Location(uri))
    version = lance.dataset(uri).version
    SealedTable(Location(uri)).finish(Steps(in_process))
    publish(Location(uri))
    assert lance.dataset(uri).version == version == PassageTable.open(uri).version


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", "other"),
        ("ratios", (4,)),
        ("store_dtype", "float16"),
        ("max_length", 512),
        ("keep_text", False),
    ],
)
def test_another_configuration_is_refused_by_name(plan, uri, field, value):
    Ledger.begin(Location(uri), SPEC, plan).commit([encode(plan, uri, 0)])
    other = TableSpec(**{**SPEC.__dict__, field: value})
    with pytest.raises(MismatchError, match=f"begun with {field} ") as caught:
        Ledger.begin(Location(uri), other, plan)
    assert caught.value.field == field


def test_other_input_is_refused(plan, uri):
    Ledger.begin(Location(uri), SPEC, plan).commit([encode(plan, uri, 0)])
    with pytest.raises(MismatchError, match="begun with other input"):
        Ledger.begin(Location(uri), SPEC, Plan(plan.shards[:-1]))


def test_a_table_without_rows_is_begun_anew(plan, uri):
    first = Ledger.begin(Location(uri), SPEC, plan)
    other = Ledger.begin(Location(uri), TableSpec(**{**SPEC.__dict__, "max_length": 32}), plan)
    assert (other.generation, other.done) == (1, set())
    with pytest.raises(FencedError):
        first.commit([encode(plan, uri, 0)])


def test_addresses_lancedb_could_not_open_are_refused(plan, tmp_path):
    with pytest.raises(InputError, match=r"must end in \.lance"):
        Ledger.begin(Location(str(tmp_path / "table")), SPEC, plan)


def test_lance_refuses_what_the_protocol_stands_on(uri):
    """A run does not try this: pylance is pinned, and another version must pass here first."""
    checks = [c for c in examine(Location(uri)) if c.name.startswith("lance: refuse")]
    assert len(checks) == 4
    assert [c for c in checks if c.problem] == []
