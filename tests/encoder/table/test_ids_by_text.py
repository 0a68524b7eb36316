"""A text finds the row that was encoded from it, and no other."""

import lance
import pyarrow as pa
import pytest

from kalm_encoder import PassageTable
from kalm_encoder.errors import CorruptRowError, InputError
from kalm_encoder.table import row_index
from kalm_encoder.table.location import Location
from kalm_encoder.table.restricted import RestrictedTable
from kalm_encoder.table.row_index import RowIndex, TextOrder
from pipeline.upkeep.delete import compact, delete
from tests.conftest import encode_table, make_texts, write_corpus

TEXTS = make_texts(60)  # short ones are there repeatedly
IDS = [f"p{i}" for i in range(60)]


def open_matching(uri, **options):
    return PassageTable.open(str(uri), match_text=True, **options)


def ids_of(text):
    return {id for id, other in zip(IDS, TEXTS, strict=True) if other == text}


@pytest.fixture
def reads(monkeypatch):
    """The columns and rows of every read."""
    made = []
    scan = PassageTable._scan
    monkeypatch.setattr(
        PassageTable, "_scan", lambda self, *a, **k: (made.append(a), scan(self, *a, **k))[1]
    )
    return made


def test_every_stored_text_is_found_in_one_read(small_table, reads):
    table = open_matching(small_table)
    found = table.ids_by_text(TEXTS[::-1])
    assert found.keys() == set(TEXTS)
    assert all(id in ids_of(text) for text, id in found.items())
    assert [columns for columns, _ in reads] == [["id", "text_hash", "_rowaddr"]]
    assert reads[0][1].count(",") == len(found) - 1, "one row per text"
    assert table.ids_by_text(TEXTS[:9]) == {text: found[text] for text in TEXTS[:9]}
    assert len(reads) == 1, "what was found is remembered"


def test_nothing_is_read_for_a_text_that_is_not_stored(small_table, reads):
    table = open_matching(small_table)
    changed = [
        change
        for text in TEXTS
        for change in (text + " ", text[:-1], text.swapcase(), f"<Document>: {text}", text + "\n")
    ]
    assert table.ids_by_text([c for c in changed if c not in TEXTS]) == {}
    assert table.ids_by_text([]) == {}
    assert reads == []


@pytest.mark.parametrize("kinds", [1, 7, 100])
def test_texts_whose_hashes_begin_alike_are_told_apart(small_table, monkeypatch, kinds):
    plain = open_matching(small_table).ids_by_text(TEXTS)
    real = row_index.first_halves
    monkeypatch.setattr(row_index, "first_halves", lambda hashes: real(hashes) % kinds)
    table = open_matching(small_table)
    strangers = [f"stranger {n}" for n in range(200)]
    for texts in (TEXTS, [*strangers, *TEXTS], *([text] for text in TEXTS)):
        assert table.ids_by_text(texts) == {text: plain[text] for text in texts if text in plain}
    assert table.ids_by_text(strangers) == {}


@pytest.fixture(scope="module")
def repeated(model_dir, tmp_path_factory):
    """Twelve ids in three files, of which four have each of three texts."""
    folder = tmp_path_factory.mktemp("repeated")
    corpus = write_corpus(folder / "c.jsonl", ["one", "two", "three"] * 4)
    encode_table(model_dir, corpus, folder / "t.lance", shard_size=5)
    return folder / "t.lance"


def test_of_several_rows_with_one_text_the_same_is_found_in_every_version(repeated):
    before = open_matching(repeated).ids_by_text(["one", "two", "three"])
    assert len(set(before.values())) == 3
    gone = before["two"]
    delete(Location(str(repeated)), [gone])
    compact(Location(str(repeated)))
    after = open_matching(repeated).ids_by_text(["one", "two", "three"])
    assert {**after, "two": gone} == before
    assert after["two"] != gone
    assert int(after["two"][1:]) % 3 == 1


def test_a_view_finds_its_own_rows_only(repeated, reads):
    table = open_matching(repeated)
    first = table.ids_by_text(["one"])["one"]
    view = RestrictedTable(table, f"id <> '{first}' AND id NOT IN ('p1', 'p4', 'p7', 'p10')")
    reads.clear()
    assert view.ids_by_text(["one"])["one"] in {"p0", "p3", "p6", "p9"} - {first}
    assert reads[0][1].count(",") == 0, "a row that it hides is not even read"
    view._dataset = None  # nothing is read for a text that it hides, as for one that is not there
    assert view.ids_by_text(["two", "four"]) == {}


def test_a_table_above_the_limit_is_refused_with_the_bytes_that_it_needs(small_table):
    size = RowIndex.size(60, (2, 8)) + TextOrder.size(60)
    table = open_matching(small_table, index_bytes=size)
    assert table.index.nbytes + table.by_text.nbytes == size == 60 * (29 + 2 * 8 + 4)
    with pytest.raises(InputError, match=rf"the limit is 0\.0 MB: give --index-mb 1 .*={size}"):
        open_matching(small_table, index_bytes=size - 1)


def test_what_cannot_be_looked_up_is_said(small_table):
    with pytest.raises(InputError, match="was opened without match_text"):
        PassageTable.open(str(small_table)).ids_by_text(["a"])
    with pytest.raises(InputError, match="is not valid Unicode"):
        open_matching(small_table).ids_by_text(["\ud800"])


@pytest.mark.parametrize("column", ["id", "text_hash"])
def test_a_damaged_row_is_a_miss_or_an_error_and_never_another_passage(
    small_table, tmp_path, column
):
    rows = PassageTable.open(str(small_table)).dataset.to_table()
    values = rows[column].to_pylist()
    at, other = (rows["id"].to_pylist().index(id) for id in ("p7", "p8"))
    values[at] = values[other] if column == "id" else bytes(16)
    place, field = rows.schema.get_field_index(column), rows.schema.field(column)
    uri = tmp_path / "t.lance"
    lance.write_dataset(rows.set_column(place, field, pa.array(values, field.type)), uri)
    table = open_matching(uri, version=1)
    assert ids_of(TEXTS[7]) == {"p7"}
    found = table.ids_by_text([TEXTS[7]])
    if column == "text_hash":
        assert found == {}
    else:
        with pytest.raises(CorruptRowError):
            table.take(list(found.values()))
