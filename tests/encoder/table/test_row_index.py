"""With the index of ids in memory, a take returns what it returns without it."""

import lance
import numpy as np
import pyarrow as pa
import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import CorruptRowError, MissingIdsError
from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.table import row_index
from kalm_encoder.table.location import Location
from kalm_encoder.table.row_index import RowIndex
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.run.job import EncodeJob
from pipeline.upkeep.delete import compact, delete
from pipeline.upkeep.sync import sync
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus
from tests.golden import write

IDS = [f"p{i}" for i in range(60)]
PLENTY = 1 << 20


def both(uri, **options):
    with_index = PassageTable.open(str(uri), index_bytes=PLENTY, **options)
    assert with_index.index is not None
    return with_index, PassageTable.open(str(uri), **options)


def outcome(table, ids, ratio=None):
    """What a caller sees of a take: passages, or the error."""
    try:
        taken = table.take(ids, ratio=ratio)
    except (MissingIdsError, CorruptRowError) as error:
        return type(error), str(error), getattr(error, "ids", None)
    return [(p.states.dtype, p.states.tobytes(), p.num_tokens, p.truncated) for p in taken]


def assert_same(uri, ids, ratios=(None,), **options):
    indexed, plain = both(uri, **options)
    for ratio in ratios:
        assert outcome(indexed, ids, ratio) == outcome(plain, ids, ratio)
    return indexed


def test_takes_are_the_same_in_any_order_repeated_or_missing(small_table):
    for ids in (IDS, IDS[::-1], ["p3", "p1", "p3"], ["p1", "nope", "p2", "nor this"], ["nope"], []):
        assert_same(small_table, ids, (None, 2, 4, 8, 64))


def test_only_states_are_read(small_table, monkeypatch):
    table, _ = both(small_table)
    read = []
    scan = PassageTable._scan
    monkeypatch.setattr(
        PassageTable, "_scan", lambda self, *a: (read.append(a[0]), scan(self, *a))[1]
    )
    table.take(IDS, ratio=8)
    assert read == [["states_r8", "_rowaddr"]]
    with pytest.raises(MissingIdsError):
        table.take(["nope"])
    assert len(read) == 1, "an id whose hash no row has needs no look-up"


def test_rows_are_fetched_by_address_not_by_a_scan(small_table):
    table, _ = both(small_table)
    plan = table.dataset.scanner(["states_r2"], filter="_rowaddr IN (1, 2)").explain_plan(True)
    assert "full_filter=--, refine_filter=--" in plan


@pytest.mark.parametrize("version", write.VERSIONS)
@pytest.mark.parametrize("dtype", write.FILES)
def test_every_store_dtype(dtype, version):
    assert_same(write.path_of(version, dtype), write.IDS, (2, 4, 8))


@pytest.mark.parametrize("kinds", [1, 7, 100])
def test_ids_that_share_a_hash_are_told_apart(small_table, monkeypatch, kinds):
    real = row_index.id_hash
    monkeypatch.setattr(row_index, "id_hash", lambda id: real(id) % kinds)
    indexed, plain = both(small_table)
    single, shared = indexed.index.find(IDS)
    assert len(single) + len(shared) == 60
    assert shared
    assert single or kinds < 100
    strangers = [f"x{i}" for i in range(200)]
    for ids in (IDS, [*strangers, *IDS], [*IDS, *strangers], *([s] for s in strangers[:20])):
        assert outcome(indexed, ids) == outcome(plain, ids)


def test_a_version_is_indexed_after_deletes_compaction_and_sync(model_dir, tmp_path):
    corpus, uri = tmp_path / "c.jsonl", tmp_path / "t.lance"
    texts = make_texts(60)
    encode_table(model_dir, write_corpus(corpus, texts), uri, shard_size=7)
    asked = [f"p{i}" for i in range(70)]
    first, _ = both(uri)
    before = outcome(first, IDS)
    delete(Location(str(uri)), ["p0", "p13", "p59"])
    changed = assert_same(uri, asked)
    with pytest.raises(MissingIdsError) as caught:
        changed.take(IDS)
    assert caught.value.ids == ["p0", "p13", "p59"]
    texts = [*texts[:20], *(f"{text} again" for text in texts[20:]), *make_texts(5, seed=9)]
    write_corpus(corpus, texts)
    sync(EncodeJob(inputs=(str(corpus),), uri=str(uri), model=str(model_dir)), in_process)
    assert_same(uri, asked)
    assert_same(uri, asked[:65])
    compact(Location(str(uri)))
    assert_same(uri, asked[:65])
    assert outcome(first, IDS) == before, "an open handle stays on its version"


@pytest.mark.parametrize("column", ["states_r2", "truncated", "checksum_r2"])
def test_damaged_rows_are_still_named(small_table, tmp_path, column):
    rows = PassageTable.open(str(small_table)).dataset.to_table()
    values = rows[column].to_pylist()
    at = rows["id"].to_pylist().index("p7")
    values[at] = values[at - 1] if column != "truncated" else not values[at]
    place, field = rows.schema.get_field_index(column), rows.schema.field(column)
    uri = tmp_path / "t.lance"
    lance.write_dataset(rows.set_column(place, field, pa.array(values, field.type)), uri)
    for table in both(uri, version=1):
        with pytest.raises(CorruptRowError, match=r"row 'p7' of .* does not match its checksum"):
            table.take(IDS)
        assert len(table.take(IDS[8:])) == 52


def test_an_id_that_is_there_twice_is_an_error(tmp_path):
    spec = TableSpec("m", None, "f", dim=4, max_length=64, ratios=(2,), store_dtype="float32")
    passage = write.passages(1)[0]
    states = np.ones((len(passage.states), 4), np.float32)
    twice = [type(passage)(states, passage.num_tokens, False)] * 2
    uri = tmp_path / "t.lance"
    lance.write_dataset(build_rows(spec, ["a", "a"], ["", ""], PackedStates.of(twice), "s"), uri)
    for table in both(uri, version=1):
        with pytest.raises(CorruptRowError, match=r"'a' is in .* more than once"):
            table.take(["a"])


def test_a_table_above_the_limit_is_read_from_disk(small_table, caplog):
    size = RowIndex.size(60, (2, 8))
    assert PassageTable.open(str(small_table), index_bytes=size).index.nbytes == size
    table = PassageTable.open(str(small_table), index_bytes=size - 1)
    assert table.index is None
    assert "an index of 60 rows takes" in caplog.text
    assert len(table.take(IDS)) == 60


def test_a_reranker_passes_it_on(small_table):
    indexed = Reranker.open(str(small_table), index_bytes=PLENTY)
    plain = Reranker.open(str(small_table))
    assert indexed.table.index is not None
    assert plain.table.index is None
    for options in ({}, {"ratio": 16}, {"cascade": [(8, 20), (2, None)]}):
        assert indexed.rerank("token", IDS, **options) == plain.rerank("token", IDS, **options)
