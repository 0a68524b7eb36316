"""Rows that are merged in by id, on the workers, in one commit."""

import random

import lance
import pyarrow as pa
import pytest
from lance.commit import CommitConflictError

from kalm_encoder.errors import IncompleteError, KalmError
from kalm_encoder.table.location import Location
from pipeline.table import merging
from pipeline.table.erasures import begin_erasure
from pipeline.table.merging import merge_rows
from pipeline.table.steps import Steps
from pipeline.workers.local import in_process

FIELDS = pa.schema([pa.field("id", pa.string(), nullable=False), ("value", pa.int64())])
ODD = ["", "it's", 'a "quoted" id', "é😀", "a\nb", "\\", "%", "_", "NULL"]


def write(path, rows, rows_per_file, columns=("id", "value")):
    """Write a dataset of these ids and values as the tables of this project are written."""
    table = pa.table({"id": list(rows), "value": list(rows.values())}).cast(FIELDS)
    lance.write_dataset(
        table.select(columns), path, max_rows_per_file=rows_per_file, enable_stable_row_ids=True,
        data_storage_version="2.2",
    )  # fmt: skip
    return Location(str(path))


def merge(table, staged, execute=in_process):
    dataset = table.dataset()
    operation = merge_rows(Steps(execute), table, dataset, staged)
    return lance.LanceDataset.commit(
        dataset, operation, read_version=dataset.version, max_retries=0
    )


def held(dataset):
    rows = dataset.to_table().to_pylist()
    return {row["id"]: row["value"] for row in rows}, len(rows)


@pytest.fixture
def small_parts(monkeypatch):
    for name, rows in (("COPIED_ROWS", 20), ("GROUP_ROWS", 30), ("LOOKED_UP_AT_ONCE", 7)):
        monkeypatch.setattr(merging, name, rows)
    monkeypatch.setattr(merging, "COPIED_AT_ONCE", 3)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_rows_are_replaced_or_added_by_id(tmp_path, small_parts, seed, indexed):
    rng = random.Random(seed)
    ids = [*ODD, *(f"r{i}" for i in range(200))]
    rng.shuffle(ids)
    table = write(tmp_path / "t.lance", dict.fromkeys(ids, 0), 25)
    if indexed:
        table.dataset().create_scalar_index("id", "BTREE")
    whole_fragment = ids[25:50]
    changed = {*rng.sample(ids, 40), *ODD, *whole_fragment}
    both = [*changed, *(f"new{i}" for i in range(30)), "it's new"]
    rng.shuffle(both)
    parts = [dict.fromkeys(both[:50], 1), dict.fromkeys(both[50:], 2)]
    staged = [
        write(tmp_path / "0.lance", parts[0], 11),
        write(tmp_path / "1.lance", parts[1], 11, ("value", "id")),  # any order of the columns
    ]
    dataset = merge(table, staged)
    expected = dict.fromkeys(ids, 0) | parts[0] | parts[1]
    assert held(dataset) == (expected, len(expected))
    row_ids = dataset.scanner(columns=["id"], with_row_id=True).to_table()["_rowid"].to_pylist()
    assert len(set(row_ids)) == len(expected)
    # Once more: what a process does that does not know whether its commit arrived.
    assert held(merge(table, staged)) == (expected, len(expected))


def test_nothing_to_merge_changes_nothing(tmp_path):
    table = write(tmp_path / "t.lance", {"a": 1}, 9)
    assert held(merge(table, [write(tmp_path / "none.lance", {}, 9)])) == ({"a": 1}, 1)


def test_an_interrupted_merge_is_continued(tmp_path, small_parts):
    table = write(tmp_path / "t.lance", {f"r{i}": 0 for i in range(100)}, 25)
    staged = write(tmp_path / "s.lance", {f"r{i}": 1 for i in range(0, 100, 2)}, 11)
    done = []

    def dies_after_two(work, units):
        for outcome in in_process(work, units):
            if len(done) == 2:
                raise KeyboardInterrupt
            done.append(outcome)
            yield outcome

    with pytest.raises(KeyboardInterrupt):
        merge(table, [staged], dies_after_two)
    again = []

    def counts(work, units):
        again.extend([type(work).__name__] * len(units))
        yield from in_process(work, units)

    dataset = merge(table, [staged], counts)
    assert held(dataset) == ({f"r{i}": (i + 1) % 2 for i in range(100)}, 100)
    assert again.count("CopyRows") == 4 - 2


@pytest.mark.parametrize("gone", ["data/*", "_kalm/steps/finish/*/merge-*/*.lance"])
def test_files_that_are_gone_are_written_again(tmp_path, small_parts, gone):
    table = write(tmp_path / "t.lance", {"a": 0, "b": 0}, 9)
    staged = write(tmp_path / "s.lance", {"b": 1, "c": 1}, 9)
    before = set((tmp_path / "t.lance").glob(gone))
    merge_rows(Steps(in_process), table, table.dataset(), [staged])
    written = set((tmp_path / "t.lance").glob(gone)) - before
    assert written
    for path in written:
        path.unlink()
    with pytest.raises(KalmError, match="Run again"):
        merge(table, [staged])
    assert held(merge(table, [staged])) == ({"a": 0, "b": 1, "c": 1}, 3)


def test_what_was_erased_since_it_was_staged_is_not_left_in_a_file(tmp_path):
    table = write(tmp_path / "t.lance", {"a": 0, "b": 0}, 9)
    staged = write(tmp_path / "s.lance", {"b": 1, "c": 1}, 9)
    before = {path.name for path in (tmp_path / "t.lance/data").iterdir()}
    begin_erasure(table, ["c"])
    with pytest.raises(IncompleteError, match="erased after"):
        merge(table, [staged])
    assert {path.name for path in (tmp_path / "t.lance/data").iterdir()} == before


def test_a_change_by_another_process_is_a_conflict(tmp_path):
    table = write(tmp_path / "t.lance", {"a": 0, "b": 0}, 9)
    staged = write(tmp_path / "s.lance", {"b": 1}, 9)
    dataset = table.dataset()
    operation = merge_rows(Steps(in_process), table, dataset, [staged])
    schema = lance.schema.LanceSchema.from_pyarrow(
        dataset.schema.with_metadata({"kalm.epoch": "2"})
    )
    claimed = lance.LanceOperation.Merge([f.metadata for f in dataset.get_fragments()], schema)
    lance.LanceDataset.commit(dataset, claimed, read_version=dataset.version, max_retries=0)
    with pytest.raises((CommitConflictError, OSError)):
        lance.LanceDataset.commit(dataset, operation, read_version=dataset.version, max_retries=0)
    assert held(table.dataset()) == ({"a": 0, "b": 0}, 2)
