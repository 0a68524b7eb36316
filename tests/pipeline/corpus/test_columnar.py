"""Parquet files and Lance tables of other writers: types, bad values, repeated columns."""

from decimal import Decimal

import lance
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions, Passage
from pipeline.corpus.shards import ShardReader, plan_shards
from pipeline.estimate.sources import open_sources

BAD = b"caf\xe9 \xff"
STRING = pa.string()
LANCE_VERSIONS = ("2.0", "2.1", "2.2")


def read(file, *, shard_size=7, **fields):
    """The passages and rejects of a file."""
    files = expand_inputs([str(file)], None)
    plan = plan_shards(files, shard_size=shard_size, fields=FieldOptions(**fields))
    reader, passages, rejects = ShardReader(), [], []
    for shard in plan.shards:
        more, bad, _ = reader.read(shard)
        passages += more
        rejects += bad
    assert len(passages) + len(rejects) == plan.num_rows
    return passages, rejects


def strings(values, kind=STRING):
    """A column of strings, made of bytes that may not be UTF-8: no writer checks them."""
    width = "int64" if kind == pa.large_string() else "int32"
    offsets = np.cumsum([0, *map(len, values)], dtype=width)
    buffers = [None, pa.py_buffer(offsets.tobytes()), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(kind, len(values), buffers)


def write(file, table, **options):
    if file.suffix == ".lance":
        lance.write_dataset(table, file, **options)
    else:
        pq.write_table(table, file, **options)
    return file


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), "dictionary"])
@pytest.mark.parametrize("column", ["id", "text", "title"])
def test_a_bad_string_in_parquet_is_one_reject(tmp_path, column, kind):
    n, bad = 40, 23
    columns = {name: [f"{name}{i}".encode() for i in range(n)] for name in ("id", "text", "title")}
    columns[column][bad] = BAD
    table = pa.table({k: strings(v, pa.string() if kind == "dictionary" else kind)
                      for k, v in columns.items()})  # fmt: skip
    if kind == "dictionary":
        codes = pa.array(range(n), pa.int32())
        coded = pa.DictionaryArray.from_arrays(codes, table[column].combine_chunks())
        table = table.set_column(table.column_names.index(column), column, coded)
    file = write(tmp_path / "c.parquet", table, row_group_size=n)
    passages, rejects = read(file)
    assert passages == [Passage(f"id{i}", f"title{i} text{i}") for i in range(n) if i != bad]
    (reject,) = rejects
    assert (reject.path, reject.line) == (str(file), bad + 1)
    assert "not valid Unicode" in reject.reason
    assert reject.id == (None if column == "id" else f"id{bad}")


@pytest.mark.parametrize("version", LANCE_VERSIONS)
@pytest.mark.parametrize("column", ["id", "text"])
def test_a_bad_string_in_a_lance_table_is_one_reject(tmp_path, column, version):
    n, bad = 40, {0: BAD, 23: b"\xff", 24: b"caf\xe9", 39: "é".encode()[:1]}
    columns = {name: [f"{name}{i}".encode() for i in range(n)] for name in ("id", "text")}
    for i, value in bad.items():
        columns[column][i] = value
    table = pa.table({name: strings(values) for name, values in columns.items()})
    file = write(tmp_path / "c.lance", table, data_storage_version=version)
    passages, rejects = read(file)
    assert passages == [Passage(f"id{i}", f"text{i}") for i in range(n) if i not in bad]
    assert [(r.path, r.line) for r in rejects] == [(str(file), i + 1) for i in bad]
    assert all("not UTF-8" in r.reason for r in rejects)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
@pytest.mark.parametrize("version", LANCE_VERSIONS)
@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_that_two_strings_share_is_two_rejects(tmp_path, character, version, kind):
    """Lance checks all bytes of a column at once and reads this as an offset in a character."""
    whole = character.encode()
    texts = strings([b"a", whole[:1], whole[1:], "é".encode(), b"b"], kind)
    table = pa.table({"id": ["0", "1", "2", "3", "4"], "text": texts})
    file = write(tmp_path / "c.lance", table, data_storage_version=version)
    passages, rejects = read(file)
    assert passages == [Passage("0", "a"), Passage("3", "é"), Passage("4", "b")]
    assert [r.line for r in rejects] == [2, 3]


@pytest.mark.parametrize("name", ["c.parquet", "c.lance"])
def test_an_estimate_counts_a_bad_string_and_goes_on(tmp_path, name):
    table = pa.table({"id": ["a", "b", "c"], "text": strings([b"x", BAD, b"y"])})
    (file,) = expand_inputs([str(write(tmp_path / name, table))], None)
    (source,) = open_sources(file, FieldOptions(), None)
    share, rows = source.read(0, 1)
    assert (share, [line for line, _ in rows]) == (1.0, [1, 2, 3])


def test_an_error_of_a_lance_table_that_is_no_string_is_no_reject(tmp_path):
    """A store that fails must not turn rows into rejects, which would be left out for good."""
    table = pa.table({"id": [str(i) for i in range(9)], "text": ["t"] * 9})
    file = write(tmp_path / "c.lance", table)
    files = expand_inputs([str(file)], None)
    plan = plan_shards(files, shard_size=4)
    for data in (file / "data").iterdir():
        data.unlink()
    with pytest.raises(InputError, match=r"cannot read .*c.lance"):
        ShardReader().read(plan.shards[0])


BYTES = st.binary(max_size=6) | st.text(max_size=6).map(str.encode)


@given(
    st.lists(
        st.tuples(BYTES, st.none() | st.text(max_size=3)),
        min_size=1, max_size=30,
    ),
    st.integers(1, 30),
    st.sampled_from([pa.string(), pa.large_string()]),
    st.sampled_from(["parquet", "lance"]),
)  # fmt: skip
def test_whatever_bytes_strings_hold_each_row_is_exact_or_named(
    tmp_path_factory, rows, group, kind, suffix
):
    file = tmp_path_factory.mktemp("bytes") / f"c.{suffix}"
    titles = pa.array([title for _, title in rows], pa.string_view())
    texts = strings([text for text, _ in rows], kind)
    table = pa.table({"id": range(len(rows)), "text": texts, "title": titles})
    write(file, table, **{"row_group_size": group} if suffix == "parquet" else {})
    passages, rejects = read(file)
    expected, bad = [], []
    for i, (text, title) in enumerate(rows):
        try:
            text = text.decode()
            expected.append(Passage(str(i), (text if title is None else f"{title} {text}").strip()))
        except UnicodeDecodeError:
            bad.append(i + 1)
    assert passages == expected
    assert [r.line for r in rejects] == bad


NEWEST = pl.CompatLevel.newest()
FRAME = pl.DataFrame({"id": [1, 2], "text": ["a long text of many letters", "b"]})


def test_what_polars_writes_is_read(tmp_path):
    texts = pl.col("text")
    for name, frame in {
        "plain": FRAME,
        "null": FRAME.with_columns(title=None),
        "categorical": FRAME.with_columns(texts.cast(pl.Categorical)),
        "enum": FRAME.with_columns(texts.cast(pl.Enum(FRAME["text"].to_list()))),
        "unsigned": FRAME.with_columns(pl.col("id").cast(pl.UInt64)),
    }.items():
        frame.write_parquet(tmp_path / f"{name}.parquet")
        views = frame.with_columns(texts.cast(pl.String)).to_arrow(compat_level=NEWEST)
        write(tmp_path / f"{name}-views.parquet", views)
        for file in (f"{name}.parquet", f"{name}-views.parquet"):
            expected = [Passage(str(i), t) for i, t in FRAME.iter_rows()]
            assert read(tmp_path / file) == (expected, []), file
    assert pq.read_schema(tmp_path / "plain-views.parquet").field("text").type == pa.string_view()
    assert pa.types.is_dictionary(pq.read_schema(tmp_path / "enum.parquet").field("text").type)
    assert pa.types.is_null(pq.read_schema(tmp_path / "null.parquet").field("title").type)


@pytest.mark.parametrize("suffix", ["parquet", "lance"])
@pytest.mark.parametrize(
    "kind",
    [STRING, pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), STRING)],
    ids=str,
)
def test_every_kind_of_string_is_read_and_a_null_is_one_reject(tmp_path, suffix, kind):
    texts = pa.array(["x", None]).cast(kind)
    table = pa.table({"id": pa.array([7, 8]).dictionary_encode(), "text": texts})
    passages, rejects = read(write(tmp_path / f"c.{suffix}", table))
    assert passages == [Passage("7", "x")]
    assert [(r.line, r.id) for r in rejects] == [(2, "8")]


@pytest.mark.parametrize("column", ["id", "text"])
def test_a_column_of_nulls_is_refused_where_it_matters(tmp_path, column):
    table = pa.table({"id": ["a"], "text": ["b"], column: pa.nulls(1), "other": ["o"]})
    file = write(tmp_path / "c.parquet", table)
    with pytest.raises(InputError, match=f"column '{column}' .* is null.*name another"):
        read(file)
    assert read(file, **{column: "other"})[1] == []


@pytest.mark.parametrize(
    ("column", "values", "kind", "remedy"),
    [
        ("id", [Decimal(7), None], pa.decimal128(10, 0), "int64"),
        ("id", [7.0, None], pa.float64(), "int64"),
        ("id", [7.0, None], pa.float32(), "int64"),
        ("id", [b"7", None], pa.binary(), "string"),
        ("text", [b"7", None], pa.large_binary(), "string"),
        ("text", [b"7", None], pa.binary_view(), "string"),
    ],
)
def test_the_remedy_for_a_column_of_another_type_works(tmp_path, column, values, kind, remedy):
    columns = {"id": pa.array(["a", "b"]), "text": pa.array(["7", "7"])}
    table = pa.table({**columns, column: pa.array(values, kind)})
    file = write(tmp_path / "c.parquet", table)
    with pytest.raises(InputError, match=f"column '{column}' .* must hold strings") as refused:
        read(file)
    assert f"column.cast('{remedy}')" in str(refused.value)
    cast = table.set_column(table.column_names.index(column), column, table[column].cast(remedy))
    passages, rejects = read(write(file, cast))
    assert passages == [Passage("7" if column == "id" else "a", "7")]
    assert [r.line for r in rejects] == [2]


@pytest.mark.parametrize("column", ["id", "text"])
def test_a_column_that_is_there_twice_is_refused(tmp_path, column):
    columns = {"id": ["a"], "text": ["b"]}
    arrays, names = [*map(pa.array, columns.values()), pa.array(["z"])], [*columns, column]
    file = write(tmp_path / "c.parquet", pa.Table.from_arrays(arrays, names=names))
    with pytest.raises(InputError, match=f"more than one column '{column}'"):
        read(file)
    renamed = pa.Table.from_arrays(arrays, names=[*columns, "other"])  # the remedy
    assert read(write(file, renamed)) == ([Passage("a", "b")], [])


def test_other_columns_may_be_there_twice(tmp_path):
    arrays = [pa.array([value]) for value in ("a", "b", "x", "y")]
    table = pa.Table.from_arrays(arrays, names=["id", "text", "tag", "tag"])
    assert read(write(tmp_path / "c.parquet", table)) == ([Passage("a", "b")], [])
