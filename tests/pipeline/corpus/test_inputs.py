import csv
import gzip
import io
import json

import fsspec
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_128_hexdigest

from kalm_encoder.errors import InputError
from pipeline.corpus.cells import Cells, quoted_records
from pipeline.corpus.inputs import RowRange, expand_inputs
from pipeline.corpus.passages import FieldOptions, Passage, Reject
from pipeline.corpus.shards import ShardReader, plan_shards
from pipeline.corpus.text_scan import cut, line_chunks, quoted_chunks, record_chunks


def read_all(files, *, shard_size=7, **options):
    found = expand_inputs([str(f) for f in files], None)
    plan = plan_shards(found, shard_size=shard_size, **options)
    reader = ShardReader()
    passages, rejects = [], []
    for shard in plan.shards:
        more, bad, _ = reader.read(shard)
        passages += more
        rejects += bad
    return plan, passages, rejects


RECORDS = [{"_id": f"d{i}", "title": f"T{i}", "text": f"text {i} é漢\n'\""} for i in range(40)]
EXPECTED = [Passage(r["_id"], f"{r['title']} {r['text']}".strip()) for r in RECORDS]


def jsonl(records=RECORDS) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def write_every_format(folder):
    """The same 40 records in each format."""
    table = pa.Table.from_pylist(RECORDS)
    (folder / "a.jsonl").write_bytes(jsonl())
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl()[:500]) + gzip.compress(jsonl()[500:]))
    two_frames = zstd.compress(jsonl()[:500]) + zstd.compress(jsonl()[500:])
    (folder / "c.jsonl.zst").write_bytes(two_frames)
    for name, dialect in (("d.csv", "excel"), ("e.tsv", "excel-tab")):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["title", "_id", "text"], dialect=dialect)
            writer.writeheader()
            writer.writerows(RECORDS)
    pq.write_table(table, folder / "f.parquet", row_group_size=15)
    lance.write_dataset(table, folder / "g.lance")
    return sorted(p for p in folder.iterdir())


@pytest.mark.parametrize("name", list("abcdefg"))
def test_every_format_reads_the_same_passages(tmp_path, name):
    (file,) = [f for f in write_every_format(tmp_path) if f.name.startswith(name)]
    # Cells that span lines are nothing a TSV is expected to have.
    options = FieldOptions(quoting=True) if name == "e" else None
    plan, passages, rejects = read_all([file], fields=options)
    assert passages == EXPECTED
    assert rejects == []
    assert plan.num_rows == 40
    assert max(s.rows.num_rows for s in plan.shards) == 7


def test_ms_marco_collection_has_no_header_and_no_quoting(tmp_path):
    file = tmp_path / "collection.tsv"
    file.write_text('0\ta "quoted passage\n1\tplain\n', encoding="utf-8")
    _, passages, _ = read_all([file])
    assert passages == [Passage("0", 'a "quoted passage'), Passage("1", "plain")]


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    shard_size=st.integers(1, 12),
    limit=st.none() | st.integers(1, 60),
    blank=st.booleans(),
)
def test_shards_cover_every_row_once(tmp_path_factory, lengths, shard_size, limit, blank):
    folder = tmp_path_factory.mktemp("cover")
    files, expected = [], []
    for f, n in enumerate(lengths):
        ids = [f"{f}-{i}" for i in range(n)]
        lines = [json.dumps({"id": i, "text": "x" * len(i)}) for i in ids]
        (folder / f"{f}.jsonl").write_text(("\n\n" if blank else "\n").join(lines))
        files.append(folder / f"{f}.jsonl")
        expected += ids
    if not expected:
        with pytest.raises(InputError, match="no rows in"):
            read_all(files)
        return
    plan, passages, rejects = read_all(files, shard_size=shard_size, limit=limit)
    assert [p.id for p in passages] == expected[:limit]
    assert not rejects
    assert plan.num_rows == len(expected[:limit])
    assert [s.number for s in plan.shards] == list(range(len(plan.shards)))
    assert all(s.rows.num_rows <= shard_size for s in plan.shards)


def test_the_plan_depends_on_content_not_on_place(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "c.jsonl").write_bytes(jsonl())
    one, two = (read_all([tmp_path / f / "c.jsonl"])[0] for f in ("one", "two"))
    assert one.hash == two.hash
    (tmp_path / "two" / "c.jsonl").write_bytes(jsonl(RECORDS[:-1]))
    assert read_all([tmp_path / "two" / "c.jsonl"])[0].hash != one.hash
    assert read_all([tmp_path / "one" / "c.jsonl"], shard_size=8)[0].hash != one.hash


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_a_file_that_changes_after_planning_is_noticed(tmp_path, name):
    file = tmp_path / name

    def write(records):
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist(records), file)
        else:
            file.write_bytes(jsonl(records))

    write(RECORDS)
    plan = plan_shards(expand_inputs([str(file)], None), shard_size=10)
    write([*RECORDS[:-1], {**RECORDS[-1], "text": "changed"}])
    with pytest.raises(InputError, match="changed after it was planned"):
        ShardReader().read(plan.shards[-1])


def test_bad_rows_are_rejected_with_line_and_reason(tmp_path):
    lines = [
        b'{"_id": "good", "text": "fine"}',
        b'{"_id": "broken", "text": ',
        b'{"_id": "null", "text": null}',
        b'{"_id": "number", "text": 7}',
        b'{"_id": "", "text": "no id"}',
        b'{"text": "no id at all"}',
        b'{"_id": null, "text": "null id"}',
        b"",
        b'["a", "list"]',
        b'{"_id": "bytes", "text": "\xff\xfe"}',
        b'{"_id": "lone", "text": "\\ud800"}',
        b'{"_id": "good", "text": "again"}',
        b'{"_id": 12, "text": ""}',
        b'{"_id": "title", "title": 5, "text": "x"}',
        b'{"_id": true, "text": "x"}',
    ]
    file = tmp_path / "c.jsonl"
    file.write_bytes(b"\n".join(lines))
    _, passages, rejects = read_all([file], shard_size=100, fields=FieldOptions(title="title"))
    assert passages == [Passage("good", "fine"), Passage("good", "again"), Passage("12", "")]
    reasons = {r.line: r.reason for r in rejects}
    assert set(reasons) == {2, 3, 4, 5, 6, 7, 9, 10, 11, 14, 15}
    for line, part in {
        2: "not JSON",
        3: "'text' holds no text: missing or null",
        4: "holds no text: int '7'",
        5: "holds no id",
        6: "holds no id: missing or null",
        9: "a JSON list",
        10: "not UTF-8",
        11: "surrogate",
        14: "'title' holds no text",
        15: "bool",
    }.items():
        assert part in reasons[line], (line, reasons[line])
    assert all(r.path == str(file) for r in rejects)
    assert Reject(str(file), 3, reasons[3], "null") in rejects


def test_csv_rows_of_the_wrong_width_are_rejected(tmp_path):
    file = tmp_path / "c.csv"
    file.write_text('id,text\n1,"two\nlines"\n2\n3,ok\n')
    _, passages, rejects = read_all([file])
    assert passages == [Passage("1", "two\nlines"), Passage("3", "ok")]
    (reject,) = rejects
    assert reject.line == 4
    assert reject.reason.startswith("1 columns instead of 2; if it is the rest of the row before")


def test_fields_can_be_named_and_are_checked(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text('{"key": "k", "abstract": "a", "id": "i", "text": "t"}\n')
    _, passages, _ = read_all([file], fields=FieldOptions(id="key", text="abstract"))
    assert passages == [Passage("k", "a")]
    with pytest.raises(InputError, match=r"no id field nope; it has key, .* --id-field"):
        read_all([file], fields=FieldOptions(id="nope"))
    file.write_text('{"a": 1}\n')
    with pytest.raises(InputError, match="no id field _id, id, doc_id"):
        read_all([file])


def test_wrong_column_types_are_named(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "text": [1.5]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match=r"column 'text' .* is double"):
        read_all([tmp_path / "c.parquet"])


def test_damaged_files_are_named(tmp_path):
    whole = write_every_format(tmp_path)
    for file in whole:
        if file.suffix in (".gz", ".zst", ".parquet"):
            file.write_bytes(file.read_bytes()[:-40])
            with pytest.raises(InputError, match=f"cannot read .*{file.name}"):
                read_all([file])


def test_inputs_expand_in_a_fixed_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        (tmp_path / name).write_text("x")
    found = expand_inputs([f"{tmp_path}/*.jsonl", f"{tmp_path}/c.csv"], None)
    assert [f.path.rsplit("/", 1)[-1] for f in found] == ["a.jsonl", "b.jsonl", "c.csv"]
    for given_, message in (
        ([f"{tmp_path}/*.parquet"], "no file matches"),
        ([f"{tmp_path}/none.jsonl"], "no file matches"),
        ([f"{tmp_path}/c.csv", f"{tmp_path}/*.csv"], "more than once"),
        ([f"{tmp_path}/readme.md"], "known format|no file"),
    ):
        with pytest.raises(InputError, match=message):
            expand_inputs(given_, None)


def test_any_fsspec_url_works():
    with fsspec.open("memory://corpus/c.jsonl", "wb") as file:
        file.write(jsonl())
    _, passages, _ = read_all(["memory://corpus/*.jsonl"])
    assert passages == EXPECTED


LINES = [b"\n", b" ", b"\r\n", b"\v\f", b"\t\n", b"x", b"{}\n", b" y\n", b"\xff\n", b"\x85\n"]


def cut_by_hand(lines, start, first_line, shard_size, max_rows):
    """The ranges of lines, one line at a time: a row that has no place begins a new range."""
    ranges, taken, rows, all_rows = [], [], 0, 0

    def finish():
        raw = b"".join(taken)
        ranges.append(RowRange(start, len(raw), first_line, rows, xxh3_128_hexdigest(raw)))
        return start + len(raw), first_line + len(taken)

    for line in lines:
        if line.strip():
            if all_rows == max_rows:
                break
            if rows == shard_size:
                start, first_line = finish()
                taken, rows = [], 0
            rows, all_rows = rows + 1, all_rows + 1
        taken.append(line)
    if rows:
        finish()
    return ranges


@given(
    st.lists(st.sampled_from(LINES), max_size=60),
    st.integers(1, 5),
    st.none() | st.integers(1, 12),
    st.integers(1, 40),
)
def test_ranges_are_cut_where_lines_are(parts, shard_size, max_rows, read_bytes):
    """Cutting megabytes at a time gives the ranges and hashes of going line by line."""
    raw = b"".join(parts)
    lines = [line + b"\n" for line in raw.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    lines = [line for line in lines if line]
    by_hand = cut_by_hand(lines, 7, 2, shard_size, max_rows)
    for chunks in (
        line_chunks(io.BytesIO(raw), read_bytes),
        record_chunks((line, None) for line in lines),
    ):
        assert list(cut(chunks, 7, 2, shard_size, max_rows=max_rows)) == by_hand


QUOTED = [
    b'"',
    b'""',
    b",",
    b"\n",
    b"\r\n",
    b"\r",
    b"a",
    b" ",
    b"\\",
    b'"a"',
    b',"',
    b'",',
    b"b,c\n",
]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(QUOTED), max_size=40),
    st.integers(1, 30),
    st.sampled_from(["csv", "rfc4180"]),
    st.integers(1, 2),
)
def test_quoted_records_are_cut_at_once_where_they_are_one_by_one(parts, size, quoting, line):
    raw, cells = b"".join(parts), Cells(("a", "b"), ",", quoting)

    def ranges(chunks):
        try:
            return list(cut(chunks, 0, line, 2, cells=cells))
        except InputError as error:
            return str(error)

    one_by_one = record_chunks(quoted_records(iter(io.BytesIO(raw)), cells, "c", line))
    at_once = quoted_chunks(io.BytesIO(raw), cells, "c", line, size)
    assert ranges(at_once) == ranges(one_by_one)
