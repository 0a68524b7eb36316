import lancedb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import CorruptRowError, InputError, MissingIdsError, TableError
from tests.conftest import encode_table, make_texts, write_corpus


@pytest.fixture(scope="module")
def table(small_table):
    return PassageTable.open(str(small_table))


def test_take_returns_the_order_asked_for(table, encoder):
    texts = make_texts(60)
    order = [59, 0, 31, 7, 0]
    taken = table.take([f"p{i}" for i in order])
    for i, passage in zip(order, taken, strict=True):
        want = encoder.encode([texts[i]], ratio=2)[0]
        assert passage.num_tokens == want.num_tokens
        np.testing.assert_allclose(passage.states, want.states, atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 4, 8, 16, 64])
def test_take_makes_any_multiple_of_a_stored_ratio(table, encoder, ratio):
    want = encoder.encode(make_texts(60)[:20], ratio=ratio)
    taken = table.take([f"p{i}" for i in range(20)], ratio=ratio)
    for got, expected in zip(taken, want, strict=True):
        np.testing.assert_allclose(got.states, expected.states, atol=1e-5)


def test_take_refuses_what_is_not_stored(table):
    with pytest.raises(InputError, match=r"ratio 3 is not a multiple of a stored ratio \(2, 8\)"):
        table.take(["p1"], ratio=3)
    with pytest.raises(MissingIdsError, match="2 of the ids asked for are not in") as caught:
        table.take(["p1", "nope", "p2", "neither"])
    assert caught.value.ids == ["nope", "neither"]
    assert table.take([]) == []


def test_both_engines_use_the_id_index(table, small_table):
    wanted = pc.field("id").isin(pa.array(["p1", "p2"]))
    plan = table.dataset.scanner(columns=["id"], filter=wanted).explain_plan()
    assert "ScalarIndexQuery" in plan
    db = lancedb.connect(small_table.parent)
    plan = db.open_table("small").search().where("id IN ('p1', 'p2')").explain_plan()
    assert "ScalarIndexQuery" in plan


def test_search_finds_by_text_best_first(table):
    hits = table.search("catalogue", 5)
    assert 0 < len(hits) <= 5
    assert [s for _, s in hits] == sorted((s for _, s in hits), reverse=True)
    texts = make_texts(60)
    assert all("catalogue" in texts[int(i[1:])] for i, _ in hits)
    assert table.search("wordthatisnowhere", 5) == []
    with pytest.raises(InputError, match="best 0"):
        table.search("x", 0)


def test_a_table_without_text_says_so(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", ["a", "b"])
    encode_table(model_dir, corpus, tmp_path / "t.lance", keep_text=False)
    table = PassageTable.open(str(tmp_path / "t.lance"))
    assert "text" not in table.dataset.schema.names
    assert len(table.take(["p0", "p1"])) == 2
    with pytest.raises(InputError, match="stores no text"):
        table.search("a", 1)


def test_missing_tables_and_versions_are_named(small_table, tmp_path):
    with pytest.raises(TableError, match="no passage table at"):
        PassageTable.open(str(tmp_path / "none.lance"))
    with pytest.raises(TableError, match="no version 'other'"):
        PassageTable.open(str(small_table), version="other")
    assert PassageTable.open(str(small_table), version="live").version > 1


@pytest.mark.parametrize("index_bytes", [0, 1 << 20])
def test_flipped_bits_in_states_are_found(model_dir, tmp_path, index_bytes):
    """Flip single bits all over a data file: what take returns is right, or it raises."""
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(20))
    uri = tmp_path / "t.lance"
    encode_table(model_dir, corpus, uri)
    ids = [f"p{i}" for i in range(20)]
    good = PassageTable.open(str(uri)).take(ids)
    (file,) = (uri / "data").glob("*.lance")
    original = file.read_bytes()
    rng = np.random.default_rng(0)
    detected = 0
    for position in rng.integers(0, int(len(original) * 0.9), 40):
        damaged = bytearray(original)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            taken = PassageTable.open(str(uri), index_bytes=index_bytes).take(ids)
        except (CorruptRowError, MissingIdsError, OSError, ValueError, pa.ArrowInvalid):
            detected += 1
            continue
        for got, want in zip(taken, good, strict=True):
            assert got.num_tokens == want.num_tokens
            assert np.array_equal(got.states, want.states)
    assert detected >= 30
