"""The steps that finish a table, on the workers: repeated ids, compaction, indexes; with kills."""

import json
import random
import shutil
import signal

import lance
import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kalm_encoder.errors import FencedError, InputError, KalmError
from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.shards import plan_shards
from pipeline.messages import ShardResult
from pipeline.table import duplicates, finish, indexes, partitions
from pipeline.table.duplicates import find_repeated, rows_at
from pipeline.table.finish import SealedTable
from pipeline.table.fragments import write_fragment
from pipeline.table.ledger import Ledger
from pipeline.table.steps import Steps
from pipeline.upkeep.delete import compact
from pipeline.workers.local import in_process
from tests.support.commands import FORKS
from tests.support.finishing import compact_and_die, finish_and_die

COLUMNS = (("year", "int64"), ("tags", "list<string>"))
SPEC = TableSpec(
    "m", None, "f", dim=4, max_length=64, ratios=(2,), store_dtype="float32",
    metadata_columns=COLUMNS,
)  # fmt: skip
SHARD, SHARDS = 20, 12
STEPS = ["deleting repeated rows", "merging fragments", "building indexes", "merging indexes"]


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


def finished_as_before(uri, columns=("year", "tags")):
    """Compact and index with Lance's own calls in one process, as this project once did."""
    dataset = lance.dataset(uri)
    dataset.optimize.compact_files(target_rows_per_fragment=3 * SHARD, batch_size=1024)
    dataset.create_scalar_index("id", "BTREE")
    dataset.create_scalar_index("text", "INVERTED", with_position=False)
    dataset.create_scalar_index("year", "BTREE")
    dataset.create_scalar_index("tags", "LABEL_LIST")
    return dataset


def answers(dataset):
    """What look-ups, filters and searches find, and that they use the indexes."""
    found = []
    for predicate in (
        "id IN ('r3', 'r50', 'r51', 'none')", "year = 1993", "array_has_any(tags, ['a', 'b'])",
    ):  # fmt: skip
        scanner = dataset.scanner(columns=["id", "text"], filter=predicate)
        assert "ScalarIndexQuery" in scanner.explain_plan(True), predicate
        found.append(scanner.to_table().to_pylist())
    for query in ("cat", "row17 eel"):
        rows = (
            dataset.scanner(columns=["text", "_score"], full_text_query=query, limit=400)
            .to_table()
            .to_pylist()
        )
        found.append(sorted((row["text"], round(row["_score"], 4)) for row in rows))
    return found


def texts_of(uri):
    return lance.dataset(uri).to_table(columns=["text"])["text"].to_pylist()


@pytest.fixture
def small_parts(monkeypatch):
    """Cut these small tables into as many parts as a large one has."""
    monkeypatch.setattr(finish, "FRAGMENT_ROWS", 3 * SHARD)
    monkeypatch.setattr(indexes, "GROUP_ROWS", 50)
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


def test_compaction_and_indexes_equal_those_of_one_process(tmp_path, small_parts, monkeypatch):
    rows = make_rows(8)
    uri = sealed(tmp_path, rows, "error")
    alone = finished_as_before(shutil.copytree(uri, tmp_path / "alone.lance"))
    SealedTable(Location(uri)).finish(Steps(in_process), index_columns=["year", "tags"])
    parts = lance.dataset(uri)
    sizes = [(f.fragment_id, f.count_rows()) for f in parts.get_fragments()]
    assert sizes == [(f.fragment_id, f.count_rows()) for f in alone.get_fragments()]
    whole = parts.scanner(with_row_id=True).to_table()
    assert whole.equals(alone.scanner(with_row_id=True).to_table())
    assert answers(parts) == answers(alone)
    described = [(i.name, i.index_type, i.num_rows_indexed) for i in parts.describe_indices()]
    assert described == [
        (i.name, i.index_type, i.num_rows_indexed) for i in alone.describe_indices()
    ]
    assert [len(i.segments) for i in parts.describe_indices()] == [1, 1, 1, 1]
    used = {segment.uuid for index in parts.describe_indices() for segment in index.segments}
    files = [path for path in tmp_path.glob("t.lance/_indices/*/*") if path.is_file()]
    assert {path.parent.name for path in files} == used
    in_lancedb = lancedb.connect(tmp_path).open_table("t")
    assert {(i.name, *i.columns) for i in in_lancedb.list_indices()} == {
        (f"{column}_idx", column) for column in ("id", "text", "year", "tags")
    }
    for predicate in ("id IN ('r3', 'r50')", "year = 1993", "array_has_any(tags, ['a'])"):
        query = in_lancedb.search().where(predicate).select(["id"])
        assert "ScalarIndexQuery" in query.explain_plan(True)
        rows = parts.scanner(columns=["id"], filter=predicate).to_table()["id"].to_pylist()
        assert sorted(row["id"] for row in query.limit(400).to_list()) == sorted(rows)


def test_a_full_text_index_of_several_segments_finds_the_same(tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(indexes, "TEXT_GROUP_ROWS", 6 * SHARD)
    uri = sealed(tmp_path, make_rows(9), "error")
    alone = finished_as_before(shutil.copytree(uri, tmp_path / "alone.lance"))
    SealedTable(Location(uri)).finish(Steps(in_process), index_columns=["year", "tags"])
    parts = lance.dataset(uri)
    segments = {index.name: len(index.segments) for index in parts.describe_indices()}
    assert segments == {"id_idx": 1, "text_idx": 2, "year_idx": 1, "tags_idx": 1}
    assert answers(parts) == answers(alone)


def test_rows_that_changed_are_found_by_their_new_values_alone(tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(indexes, "TEXT_GROUP_ROWS", 4 * SHARD)
    uri = sealed(tmp_path, make_rows(11))
    SealedTable(Location(uri)).finish(Steps(in_process), index_columns=["year", "tags"])
    lance.dataset(uri).create_scalar_index("num_tokens", "BITMAP", name="made_by_hand")
    claim = SealedTable(Location(uri))
    claim.begin_change()
    held = claim.dataset.to_table().filter(pc.equal(pc.field("year"), 1993))
    changed = held.slice(0, 5)
    for name, value in (("year", 2050), ("text", "gnu"), ("tags", ["z"])):
        column = pa.array([value] * len(changed), held.schema.field(name).type)
        changed = changed.set_column(held.schema.get_field_index(name), name, column)
    added = changed.slice(0, 2).set_column(0, held.schema.field("id"), pa.array(["new0", "new1"]))
    assert held.schema.names[0] == "id" and len(held) > 5
    staged = tmp_path / "staged.lance"
    lance.write_dataset(pa.concat_tables([changed, added]).cast(held.schema), staged)
    claim.merge(Steps(in_process), [Location(str(staged))])
    claim.delete([int(claim.dataset.scanner(with_row_id=True).to_table()["_rowid"][0].as_py())])
    claim.finish(Steps(in_process))
    dataset = lance.dataset(uri)
    for predicate in ("year = 1993", "year = 2050", "array_has_any(tags, ['z'])", "id = 'new1'"):
        scanner = dataset.scanner(columns=["id"], filter=predicate)
        assert "ScalarIndexQuery" in scanner.explain_plan(True), predicate
        by_scan = dataset.scanner(columns=["id"], filter=predicate, use_scalar_index=False)
        assert sorted(scanner.to_table()["id"].to_pylist()) == sorted(
            by_scan.to_table()["id"].to_pylist()
        )
    texts = texts_of(uri)
    for word in ("gnu", "cat", "eel", changed["text"][0].as_py()):
        found = dataset.scanner(columns=["text", "_score"], full_text_query=word, limit=400)
        assert sorted(found.to_table()["text"].to_pylist()) == sorted(
            text for text in texts if word in text.split()
        )
    rows = dataset.count_rows()
    for index in dataset.describe_indices():
        assert dataset.stats.index_stats(index.name)["num_unindexed_rows"] == 0
        assert index.num_rows_indexed == rows
    before = {segment.uuid for index in dataset.describe_indices() for segment in index.segments}
    compact(Location(uri))
    claim = SealedTable(Location(uri))
    claim.begin_change()
    claim.delete([int(claim.dataset.scanner(with_row_id=True).to_table()["_rowid"][0].as_py())])
    claim.finish(Steps(in_process), compact=False)
    after = lance.dataset(uri).describe_indices()
    assert {segment.uuid for index in after for segment in index.segments} == before, "not needed"


def test_files_that_are_gone_are_made_again(tmp_path, small_parts):
    """What an interrupted run recorded does not help if its files were removed meanwhile."""
    rows = make_rows(10)
    uri = sealed(tmp_path, rows)
    for step, files in (("merging fragments", "data/*"), ("building indexes", "_indices/*/*")):
        claim = SealedTable(Location(uri))
        before = set((tmp_path / "t.lance").glob(files))

        def remove(name, done, total, step=step, files=files, before=before):
            if name == step and done == total:
                for path in set((tmp_path / "t.lance").glob(files)) - before:
                    if path.is_file():
                        path.unlink()

        with pytest.raises(KalmError, match="Run again"):
            claim.finish(Steps(in_process, remove))
    SealedTable(Location(uri)).finish(Steps(in_process))
    assert texts_of(uri) == survivors(rows, "first")


@pytest.mark.parametrize("step", STEPS)
def test_a_claim_during_a_step_fences_it_off(step, tmp_path, small_parts):
    rows = make_rows(6)
    uri = sealed(tmp_path, rows)

    def claim_at_step(name, done, total):
        if name == step and done == total:
            SealedTable(Location(uri)).take_over()

    with pytest.raises(FencedError, match="another command took"):
        SealedTable(Location(uri)).finish(Steps(in_process, claim_at_step))
    dataset = lance.dataset(uri)
    assert (len(texts_of(uri)) == len(rows[0])) == (step == "deleting repeated rows")
    assert (len(dataset.get_fragments()) == SHARDS) == (step in STEPS[:2])
    assert not dataset.describe_indices()
    SealedTable(Location(uri)).finish(Steps(in_process))
    assert texts_of(uri) == survivors(rows, "first")


def test_a_driver_killed_in_any_step_is_continued(tmp_path):
    rows = make_rows(7)
    fresh = sealed(tmp_path, rows, "last")
    for step in ["reading ids", "finding repeated ids", *STEPS]:
        uri = shutil.copytree(fresh, tmp_path / f"{step}.lance")
        process = FORKS.Process(target=finish_and_die, args=(str(uri), step, SHARD))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        SealedTable(Location(str(uri))).finish(Steps(in_process), index_columns=["year", "tags"])
        assert texts_of(str(uri)) == survivors(rows, "last")
        answers(lance.dataset(str(uri)))
        assert not list(uri.rglob("_kalm/steps/**/*.*"))


def test_a_killed_compaction_is_run_again_but_does_not_hide_a_killed_change(tmp_path):
    rows = make_rows(12)
    uri = sealed(tmp_path, rows)
    SealedTable(Location(uri)).finish(Steps(in_process), compact=False)
    process = FORKS.Process(target=compact_and_die, args=(uri,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(lance.dataset(uri).get_fragments()) == SHARDS
    compact(Location(uri))
    assert len(lance.dataset(uri).get_fragments()) == 1
    assert texts_of(uri) == survivors(rows, "first")
    SealedTable(Location(uri)).begin_change()
    with pytest.raises(InputError, match="was interrupted"):
        compact(Location(uri))
