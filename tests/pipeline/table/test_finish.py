"""The steps that finish a table, on the workers: repeated ids, compaction, indexes; with kills."""

import json
import os
import random
import shutil
import signal

import lance
import numpy as np
import pyarrow as pa
import pytest

from kalm_encoder.errors import FencedError
from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.shards import plan_shards
from pipeline.messages import ShardResult
from pipeline.table import duplicates, partitions
from pipeline.table.duplicates import find_repeated, rows_at
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_fragment
from pipeline.table.ledger import Ledger
from pipeline.table.steps import Steps
from pipeline.workers.local import in_process
from tests.support.commands import FORKS

COLUMNS = (("year", "int64"), ("tags", "list<string>"))
SPEC = TableSpec(
    "m", None, "f", dim=4, max_length=64, ratios=(2,), store_dtype="float32",
    metadata_columns=COLUMNS,
)  # fmt: skip
SHARD, SHARDS = 20, 12


def make_rows(seed):
    """Ids with repeats within and between shards, texts and metadata that tell rows apart."""
    rng = random.Random(seed)
    count = SHARD * SHARDS
    ids = [f"r{rng.randrange(count)}" for _ in range(count)]
    texts = [f"row{n} {rng.choice(['cat', 'dog', 'eel'])}" for n in range(count)]
    years = [rng.randrange(1990, 1999) for _ in range(count)]
    tags = [rng.sample(["a", "b", "c"], k=rng.randrange(3)) for _ in range(count)]
    return ids, texts, pa.table({"year": years, "tags": tags})


def sealed(folder, rows, on_duplicate="first"):
    """A sealed table of these rows; the shards are committed out of order."""
    ids, texts, metadata = rows
    file = folder / "c.jsonl"
    file.write_text("".join(json.dumps({"id": i, "text": "t"}) + "\n" for i in ids))
    plan = plan_shards(expand_inputs([str(file)], None), shard_size=SHARD)
    uri = str(folder / "t.lance")
    ledger = Ledger.begin(Location(uri), SPEC, plan)
    for number in sorted(range(SHARDS), key=lambda n: n % 5):
        part = slice(number * SHARD, (number + 1) * SHARD)
        states = [PassageStates(np.full((1, 4), number, np.float32), 2, False)] * SHARD
        shard = plan.shards[number]
        made = build_rows(
            SPEC, ids[part], texts[part], PackedStates.of(states), shard.id,
            metadata=metadata.slice(part.start, SHARD),
        )  # fmt: skip
        ledger.commit([ShardResult(shard, write_fragment(made, lance.dataset(uri)), SHARD)])
    ledger.seal(on_duplicate)
    return uri


def survivors(rows, keep):
    """The texts that are left, by the definition of the policy."""
    ids, texts, _ = rows
    order = range(len(ids)) if keep == "first" else reversed(range(len(ids)))
    kept = {}
    for n in order:
        kept.setdefault(ids[n], n)
    return [texts[n] for n in sorted(kept.values())]


def texts_of(uri):
    return lance.dataset(uri).to_table(columns=["text"])["text"].to_pylist()


@pytest.fixture
def small_parts(monkeypatch):
    """Cut these small tables into as many parts as a large one has."""
    monkeypatch.setattr(duplicates, "GROUP_ROWS", 3 * SHARD)
    monkeypatch.setattr(partitions, "PARTITION_ROWS", 50)


@pytest.mark.parametrize("keep", ["first", "last"])
def test_one_row_of_each_id_survives_in_its_place(keep, tmp_path, small_parts):
    rows = make_rows(3)
    uri = sealed(tmp_path, rows, keep)
    before = lance.dataset(uri).scanner(columns=["text"], with_row_id=True).to_table()
    SealedTable(Location(uri)).finish(Steps(in_process))
    assert texts_of(uri) == survivors(rows, keep)
    after = lance.dataset(uri).scanner(columns=["text"], with_row_id=True).to_table()
    assert set(map(tuple, after.to_pandas().values)) < set(map(tuple, before.to_pandas().values))
    assert not list((tmp_path / "t.lance/_kalm").rglob("steps/**/*.*"))


def test_repeated_rows_are_named_alike_however_the_table_is_cut(tmp_path, monkeypatch):
    rows = make_rows(4)
    uri = sealed(tmp_path, rows)
    dataset = lance.dataset(uri)
    found = []
    for group, partition in ((10**6, 10**6), (SHARD, 40), (5 * SHARD, 100)):
        monkeypatch.setattr(duplicates, "GROUP_ROWS", group)
        monkeypatch.setattr(partitions, "PARTITION_ROWS", partition)
        folder = Location(str(tmp_path / "exchange"))
        repeated = find_repeated(Steps(in_process), Location(uri), dataset, "first", folder)
        assert repeated.count == len(rows[0]) - len(set(rows[0]))
        found.append(rows_at(dataset, repeated.shown, ["text"])["text"].to_pylist())
    assert found[0] == found[1] == found[2]
    assert set(found[0]) <= set(rows[1]) - set(survivors(rows, "first"))


def test_a_fragment_of_which_no_row_is_left_goes(tmp_path, small_parts):
    ids, texts, metadata = make_rows(5)
    ids = [f"r{n % (2 * SHARD)}" for n in range(len(ids))]
    uri = sealed(tmp_path, (ids, texts, metadata))
    SealedTable(Location(uri)).finish(Steps(in_process), compact=False)
    assert texts_of(uri) == texts[: 2 * SHARD]
    assert len(lance.dataset(uri).get_fragments()) == 2


@pytest.mark.parametrize("step", ["deleting repeated rows"])
def test_a_claim_during_a_step_fences_it_off(step, tmp_path, small_parts):
    rows = make_rows(6)
    uri = sealed(tmp_path, rows)

    def claim_at_step(name, done, total):
        if name == step and done == total:
            SealedTable(Location(uri)).take_over()

    with pytest.raises(FencedError, match="another command took"):
        SealedTable(Location(uri)).finish(Steps(in_process, claim_at_step))
    assert len(texts_of(uri)) == len(rows[0])
    SealedTable(Location(uri)).finish(Steps(in_process))
    assert texts_of(uri) == survivors(rows, "first")


def finish_and_die(uri, kill_at):
    """Finish a table in a process of its own, which is killed when it tells for the nth time."""
    duplicates.GROUP_ROWS, partitions.PARTITION_ROWS = 4 * SHARD, 120
    told = []

    def tell(*what):
        told.append(what)
        if len(told) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    SealedTable(Location(uri)).finish(Steps(in_process, tell), index_columns=["year", "tags"])


def end_of(uri, kill_at):
    process = FORKS.Process(target=finish_and_die, args=(uri, kill_at))
    process.start()
    process.join()
    return process.exitcode


def test_a_driver_killed_at_any_point_is_continued(tmp_path):
    rows = make_rows(7)
    fresh = sealed(tmp_path, rows, "last")
    expected = survivors(rows, "last")
    kill_at, ended = 2, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        uri = shutil.copytree(fresh, tmp_path / f"{kill_at}.lance")
        ended = end_of(str(uri), kill_at)
        if ended:
            SealedTable(Location(str(uri))).finish(
                Steps(in_process), index_columns=["year", "tags"]
            )
        assert texts_of(uri) == expected
        assert not list(uri.rglob("_kalm/steps/**/*.*"))
        kill_at += 4
    assert ended == 0 and kill_at > 10
