"""Fields that are kept: their types come from the file or the user, and a bad value is a reject."""

import datetime
import json

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kalm_encoder.errors import InputError
from kalm_encoder.table.metadata import TYPES
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardReader, plan_shards

ROWS = [
    {"id": "a", "text": "x", "lang": "en", "year": 2020, "score": 0.5, "ok": True, "tags": ["u"]},
    {"id": "b", "text": "y", "lang": None, "year": None, "score": None, "ok": None, "tags": None},
    {"id": "c", "text": "z", "lang": "", "year": -1, "score": 2.0, "ok": False, "tags": []},
    {"id": "d", "text": "w", "lang": "é", "year": 2**40, "score": 3.5, "ok": None, "tags": [None]},
]  # fmt: skip
NAMES = ["lang", "year", "score", "ok", "tags"]
KEPT = tuple(zip(NAMES, ["string", "int64", "float64", "bool", "list<string>"], strict=True))
TABLE = pa.Table.from_pylist(ROWS)


def read(files, keep, **options):
    fields = FieldOptions(keep=keep, **options)
    files = expand_inputs([str(file) for file in files], None)
    plan = plan_shards(files, shard_size=3, fields=fields)
    reader = ShardReader()
    found = [reader.read(shard) for shard in plan.shards]
    metadata = pa.concat_tables([rows.metadata for rows in found])
    assert metadata.num_rows == sum(len(rows.passages) for rows in found)
    assert plan.metadata_columns == tuple(
        (name, next(known for known, type in TYPES.items() if type == field.type))
        for name, field in zip(metadata.column_names, metadata.schema, strict=True)
    )
    return plan, metadata, [reject for rows in found for reject in rows.rejects]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, table):
    pq.write_table(table, path)
    return path


def lance_table(path, table):
    lance.write_dataset(table, path)
    return path


def untyped(*names):
    return tuple((name, None) for name in names)


@pytest.mark.parametrize("write", [parquet, lance_table])
def test_a_columnar_file_tells_the_types(tmp_path, write):
    file = write(tmp_path / f"c.{write.__name__.split('_')[0]}", TABLE)
    plan, metadata, rejects = read([file], untyped(*NAMES))
    assert plan.metadata_columns == KEPT
    assert metadata.to_pylist() == TABLE.select(NAMES).to_pylist()
    assert not rejects


def test_other_layouts_of_the_same_values(tmp_path):
    table = pa.table({
        "id": ["a", "b"],
        "text": ["x", "y"],
        "lang": pa.array(["en", None]).dictionary_encode(),
        "title": pa.array(["t", "u"], pa.large_string()),
        "year": pa.array([1, None], pa.uint16()),
        "big": pa.array([1, 2**62], pa.uint64()),
        "score": pa.array([0.5, None], pa.float32()),
        "tags": pa.array([["a"], None], pa.large_list(pa.large_string())),
    })  # fmt: skip
    names = ["lang", "title", "year", "big", "score", "tags"]
    plan, metadata, _ = read([parquet(tmp_path / "c.parquet", table)], untyped(*names))
    types = ["string", "string", "int32", "int64", "float32", "list<string>"]
    assert plan.metadata_columns == tuple(zip(names, types, strict=True))
    assert metadata.to_pylist() == table.select(names).to_pylist()


def test_text_files_hold_strings_unless_a_type_is_given(tmp_path):
    file = jsonl(tmp_path / "c.jsonl", [*ROWS, {"id": "e", "text": "v"}])
    _, metadata, rejects = read([file], KEPT)
    assert metadata.to_pylist() == [*TABLE.select(NAMES).to_pylist(), dict.fromkeys(NAMES)]
    assert not rejects
    plan, metadata, rejects = read([file], untyped("lang", "year"))
    assert plan.metadata_columns == (("lang", "string"), ("year", "string"))
    assert metadata["lang"].to_pylist() == [None, None]
    assert [(r.line, r.id) for r in rejects] == [(1, "a"), (3, "c"), (4, "d")]
    assert rejects[0].reason == "field 'year' holds int '2020', which is no string"
    cells = tmp_path / "c.csv"
    cells.write_text('id,text,lang,year,ok,score\na,x,en,2020,true,.5\nb,y,,,,\n"c",z,"",7,0,1e2\n')
    _, metadata, rejects = read([cells], KEPT[:4])
    assert metadata.to_pydict() == {
        "lang": ["en", "", ""], "year": [2020, None, 7], "score": [0.5, None, 100.0],
        "ok": [True, None, False],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "type", "value"),
    [
        *[("year", "int64", value) for value in ("2020", 1.5, True, 2**70, [1], {"a": 1})],
        *[("year", "int32", value) for value in (2**31, "x")],
        *[("score", "float64", value) for value in ("0.5", True)],
        *[("ok", "bool", value) for value in (1, "true")],
        *[("tags", "list<string>", value) for value in ("ab", [1], {"a": "b"}, [["x"]])],
        *[("lang", "string", value) for value in (5, ["en"], "\ud800")],
    ],
)
def test_a_value_of_another_type_rejects_its_row_alone(tmp_path, name, type, value):
    rows = [{"id": i, "text": "t", name: v} for i, v in (("a", None), ("bad", value), ("c", None))]
    _, metadata, rejects = read([jsonl(tmp_path / "c.jsonl", rows)], ((name, type),))
    assert metadata[name].to_pylist() == [None, None]
    ((path, line, reason, id),) = [(r.path, r.line, r.reason, r.id) for r in rejects]
    assert (path, line, id) == (str(tmp_path / "c.jsonl"), 2, "bad")
    assert reason.startswith(f"field {name!r} holds ") and reason.endswith(f", which is no {type}")


@pytest.mark.parametrize("write", [parquet, lance_table])
def test_bad_values_of_a_columnar_file_are_rejects_too(tmp_path, write):
    offsets = pa.py_buffer(np.arange(4, dtype="<i4").tobytes())
    bad = pa.Array.from_buffers(pa.string(), 3, [None, offsets, pa.py_buffer(b"1\xffx")])
    table = pa.table({"id": ["a", "b", "c"], "text": ["x", "y", "z"], "n": bad})
    file = write(tmp_path / f"c.{write.__name__.split('_')[0]}", table)
    _, metadata, rejects = read([file], untyped("n"))
    assert metadata["n"].to_pylist() == ["1", "x"]
    assert [(r.line, "UTF-8" in r.reason) for r in rejects] == [(2, True)]
    _, metadata, rejects = read([file], (("n", "int64"),))
    assert metadata["n"].to_pylist() == [1]
    assert [r.line for r in rejects] == [2, 3]


def test_a_date_is_kept_as_text_when_the_user_says_so(tmp_path):
    when = datetime.datetime(2020, 1, 1, 0, 30)
    table = pa.table({
        "id": ["a"], "text": ["x"], "day": pa.array([when.date()]),
        "at": pa.array([when], pa.timestamp("us", "Europe/Berlin")),
    })  # fmt: skip
    file = parquet(tmp_path / "c.parquet", table)
    with pytest.raises(InputError, match=r"'day' of .* is date32.*with --keep day:string"):
        read([file], untyped("day"))
    _, metadata, _ = read([file], (("day", "string"), ("at", "string")))
    assert metadata.to_pylist() == [{"day": "2020-01-01", "at": "2020-01-01 00:30:00.000000Z"}]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (untyped("nothing"), r"c.jsonl has no field 'nothing' to keep; it has id, text, lang"),
        (untyped("year", "lang"), r"'year' would be kept as string from .*c.jsonl and as int64 "
         r"from .*c.parquet: give one type for all, such as --keep year:string"),
        ((("tags", "int64"),), r"'tags' of .*c.parquet is list.*cannot be kept as int64: convert"),
    ],
)  # fmt: skip
def test_columns_that_cannot_be_kept_are_refused(tmp_path, keep, message):
    files = [jsonl(tmp_path / "c.jsonl", ROWS), parquet(tmp_path / "c.parquet", TABLE)]
    with pytest.raises(InputError, match=message):
        read(files, keep)


def test_one_type_for_all_files_is_what_helps(tmp_path):
    files = [jsonl(tmp_path / "c.jsonl", ROWS), parquet(tmp_path / "c.parquet", TABLE)]
    _, metadata, rejects = read(files, (("year", "int64"),))
    assert metadata["year"].to_pylist() == 2 * [row["year"] for row in ROWS]
    assert not rejects


def test_a_title_may_be_kept_and_is_still_part_of_the_text(tmp_path):
    rows = [{"id": "a", "title": "T", "text": "x"}]
    plan, metadata, _ = read([jsonl(tmp_path / "c.jsonl", rows)], untyped("title"))
    assert metadata["title"].to_pylist() == ["T"]
    assert ShardReader().read(plan.shards[0]).passages[0].text == "T x"
