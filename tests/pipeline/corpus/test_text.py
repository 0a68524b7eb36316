"""A row of a text file arrives as it was written, or is a reject, or the file is refused."""

import gzip
import json
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kalm_encoder.errors import InputError
from pipeline.corpus.inputs import InputFile, expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardReader, plan_shards
from pipeline.corpus.text_detect import detect


@pytest.fixture
def read(tmp_path):
    """Write a file, read it in shards of 2 rows, and return ids to texts, lines to reasons."""

    def write_and_read(name, content, **options):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        plan = plan_shards(
            expand_inputs([str(file)], None), shard_size=2, fields=FieldOptions(**options)
        )
        reader = ShardReader()
        rows = [reader.read(shard) for shard in plan.shards]
        passages = {p.id: p.text for some, _, _ in rows for p in some}
        rejects = {r.line: r.reason for _, some, _ in rows for r in some}
        assert len(passages) + len(rejects) == plan.num_rows
        return passages, rejects

    return write_and_read


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# Quotes

UNBALANCED = 'id\ttext\n1\t"Hello, he said\n2\tworld\n3\tfoo" bar\n4\tbaz\n'


def test_an_unbalanced_quote_in_a_tsv_swallows_no_row(read):
    with pytest.raises(
        InputError, match=r"q.tsv line 2: .*does not end in its line.* --no-quoting"
    ):
        read("q.tsv", UNBALANCED)
    exact = {"1": '"Hello, he said', "2": "world", "3": 'foo" bar', "4": "baz"}
    assert read("q.tsv", UNBALANCED, quoting=False) == (exact, {})
    mended = UNBALANCED.replace('"Hello', "Hello")
    assert read("q.tsv", mended)[0] == exact | {"1": "Hello, he said"}


def test_the_quoted_cells_of_a_tsv_may_span_lines_if_the_user_says_so(read):
    content = 'id\ttext\n1\t"two\nlines"\n2\t"a ""word"""\n'
    with pytest.raises(InputError, match=r"line 2: .* or --quoting"):
        read("c.tsv", content)
    assert read("c.tsv", content, quoting=True) == ({"1": "two\nlines", "2": 'a "word"'}, {})
    with pytest.raises(InputError, match=r"q.tsv line 2: .*ends in line 4 with text behind"):
        read("q.tsv", UNBALANCED, quoting=True)


@pytest.mark.parametrize("cell", ['"Heroes" is', '"a"b"', '"', '"""', '"\\"'])
def test_a_tsv_whose_cells_are_not_quoted_is_not_read_as_one_whose_cells_are(read, cell):
    content = f"id\ttext\n0\tplain\n1\t{cell}\n"
    with pytest.raises(InputError, match=r"c.tsv line 3: .*--no-quoting"):
        read("c.tsv", content)
    assert read("c.tsv", content, quoting=False)[0] == {"0": "plain", "1": cell}


def test_the_quotes_of_each_line_of_a_long_tsv_are_looked_at(read):
    rows = [f"{i}\t{'x' * 60_000}\n" for i in range(200)]  # several chunks of a scan
    rows[150] = '150\t"never closed\n'
    with pytest.raises(InputError, match=r"line 152: a quoted cell does not end"):
        read("long.tsv", "id\ttext\n" + "".join(rows))


def test_a_quote_that_is_never_closed_swallows_no_row(read):
    content = 'id,text\n1,ok\n2,"never closed\n3,x\n4,y\n'
    with pytest.raises(InputError, match=r"eof.csv line 3: .*never closed.* --no-quoting"):
        read("eof.csv", content)
    exact = {"1": "ok", "2": '"never closed', "3": "x", "4": "y"}
    assert read("eof.csv", content, quoting=False) == (exact, {})


def test_a_line_with_text_behind_a_closing_quote_is_a_reject(read):
    passages, rejects = read("c.csv", 'id,text\n1,"two\nlines"\n2,"Hello" he\n3,"a, b"\n4,"open')
    assert passages == {"1": "two\nlines", "3": "a, b"}
    assert rejects == {
        4: "a quoted cell has text behind its closing quote",
        6: "a quoted cell does not end in its line",
    }


def test_a_backslash_before_a_closing_quote_is_not_guessed_at(read):
    """Spark escapes quotes so; in files by RFC 4180 a path may end so."""
    content = 'id,text\n1,"\\"\n2,\\""\n'  # by Spark: one row, whose text has a line break
    with pytest.raises(InputError, match=r"c.csv line 2: .*backslash.*--quoting.*Spark"):
        read("c.csv", content)
    over_lines = 'id,text\n1,"\\""\n2,"\n'  # by RFC 4180 one row, by Spark the start of two
    with pytest.raises(InputError, match=r"c.csv line 2: .*backslash.*over several lines"):
        read("c.csv", over_lines)
    assert read("c.csv", over_lines, quoting=True)[0] == {"1": '\\"\n2,'}
    assert read("c.csv", 'id,text\n1,"C:\\"\n', quoting=True)[0] == {"1": "C:\\"}
    code = 'id,text\n1,"print(\\""hi\\"")"\n2,C:\\\n'
    assert read("c.csv", code)[0] == {"1": 'print(\\"hi\\")', "2": "C:\\"}


def test_a_line_with_text_behind_a_quote_may_go_on_in_the_next_if_backslashes_escape(read):
    """The second line would be a row that nobody wrote."""
    goes_on = 'id,title,text\r\n"0\\"\\"\r\n\'",,\r\n'
    with pytest.raises(InputError, match=r"c.csv line 2: .*backslash.*over several lines"):
        read("c.csv", goes_on)
    by_spark = 'id,title,text\n0,"","\\"\\\\"\r\n"\n1,",\'",""\n'
    with pytest.raises(InputError, match=r"c.csv line 2: .*backslash.*over several lines"):
        read("c.csv", by_spark)
    reason = "a quoted cell has text behind its closing quote"
    assert read("c.csv", goes_on, quoting=True) == ({"'\"": ""}, {2: reason})
    ends = 'id,text\r\n"a \\"b\\" c",x\r\nd,e\r\n'
    assert read("c.csv", ends) == ({"d": "e"}, {2: reason})


def test_a_quote_within_an_unquoted_cell_is_a_quote(read):
    assert read("c.csv", 'id,text\n1,5" disk\n2,a "b" c\n')[0] == {"1": '5" disk', "2": 'a "b" c'}


@pytest.mark.parametrize("name", ["first.tsv", "first.csv"])
def test_a_first_passage_that_begins_with_a_quote_does_not_read_the_file(tmp_path, name):
    file = tmp_path / name
    delimiter = "\t" if name.endswith("tsv") else ","
    file.write_text(f'0{delimiter}"unclosed\n' + f"1{delimiter}{'x' * 998}\n" * 20_000)
    tracemalloc.start()
    try:
        if name.endswith("tsv"):
            fields, _, _ = detect(InputFile(str(file), name[-3:]), FieldOptions(), None)
            assert fields.names == ["0", "1"]
        else:
            with pytest.raises(InputError, match=r"line 1: a quoted cell .*does not end within"):
                detect(InputFile(str(file), name[-3:]), FieldOptions(), None)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8_000_000  # of 20 MB


# Fields, row by row


def test_a_title_that_first_appears_late_is_read(read):
    rows = [{"id": f"{i}", "text": "x"} for i in range(150)]
    rows += [{"id": f"{i}", "text": "x", "title": "T"} for i in range(150, 200)]
    passages, _ = read("c.jsonl", jsonl(*rows))
    assert [passages["149"], passages["150"], passages["199"]] == ["x", "T x", "T x"]


def test_a_named_title_that_first_appears_late_is_read(read):
    rows = [{"id": f"{i}", "text": "x"} for i in range(150)]
    passages, _ = read("c.jsonl", jsonl(*rows, {"id": "z", "text": "x", "h": "H"}), title="h")
    assert passages["z"] == "H x"
    with pytest.raises(InputError, match="no title field h"):
        read("c.jsonl", jsonl(*rows), title="h")


@pytest.mark.parametrize(
    "comment", ["# a comment", '{"_comment": "x"}', '{"_id": "meta", "n": 1}', "[]"]
)
def test_comments_in_front_reject_no_later_row(read, comment):
    content = f"{comment}\n" * 120 + jsonl({"docid": "d", "contents": "x"})
    passages, rejects = read("c.jsonl", content)
    assert passages == {"d": "x"}
    assert sorted(rejects) == list(range(1, 121))


def test_a_row_without_the_text_of_its_file_takes_none_from_another_field(read):
    """Spark leaves a null out: then the text is missing, and what is there is something else."""
    rows = [{"id": "1", "body": "b"}, {"id": "2", "text": "t", "body": "b"}]
    passages, rejects = read("c.jsonl", jsonl(*rows))
    assert passages == {"2": "t"}
    assert rejects == {1: "field 'text' holds no text: missing or null; the row has id, body"}


def test_a_key_that_is_there_twice_is_not_chosen_from(read):
    content = '{"id": "1", "id": "2", "text": "x"}\n{"id": "3", "text": "y", "o": {"a": 1, "a": 2}}'
    passages, rejects = read("c.jsonl", content)
    assert passages == {"3": "y"}
    assert rejects == {1: "a JSON object that has a key twice"}


def test_the_id_of_an_ms_marco_passage_is_its_pid(read):
    row = {"pid": "msmarco_passage_00_0", "passage": "A", "docid": "msmarco_doc_00_0"}
    assert read("c.jsonl", jsonl(row))[0] == {"msmarco_passage_00_0": "A"}
    row = {"docid": "msmarco_doc_00_0", "pid": "p", "body": "B"}
    assert read("c.jsonl", jsonl(row))[0] == {"msmarco_doc_00_0": "B"}


# Columns and headers


@pytest.mark.parametrize("header", ["id,text,id", "ID,text,Id"])
def test_a_column_that_is_there_twice_is_refused_by_name(read, header):
    with pytest.raises(InputError, match=r"more than one column '(id|Id)'.*--id-field"):
        read("c.csv", f"{header}\n1,hello,77\n")
    assert read("c.csv", "id,text,x,x,,\n1,hello,7,7,,\n")[0] == {"1": "hello"}
    assert read("c.csv", "id,text,id,key\n1,hello,77,k\n", id="key")[0] == {"k": "hello"}


def test_a_column_of_parquet_that_is_there_twice_is_refused_by_name(tmp_path):
    table = pa.table([["1"], ["hello"], ["77"]], names=["id", "text", "id"])
    pq.write_table(table, tmp_path / "c.parquet")
    with pytest.raises(InputError, match="more than one column 'id'"):
        plan_shards([InputFile(str(tmp_path / "c.parquet"), "parquet")], shard_size=1)


@pytest.mark.parametrize(
    "header", ["docno\ttext", "DOCNO\tText", '"DocNo"\t"text"', "\n\nid\ttext"]
)
def test_a_first_line_with_a_known_name_in_any_case_is_the_header(read, header):
    assert read("d.tsv", f"{header}\nFT911-1\tfirst\n") == ({"FT911-1": "first"}, {})


def test_a_header_of_which_half_is_known_is_no_passage(read):
    content = "docno\tabstract\n1\tfirst\n"
    with pytest.raises(InputError, match=r"no text field .*has docno, abstract.*--text-field"):
        read("d.tsv", content)
    assert read("d.tsv", content, text="abstract")[0] == {"1": "first"}


def test_the_header_of_a_file_that_was_appended_is_no_passage(read):
    passages, rejects = read("c.csv", "id,text\n1,a\nid,text\n2,b\n")
    assert (passages, rejects) == ({"1": "a", "2": "b"}, {3: "the header once more"})


def test_a_first_line_that_is_no_header_is_a_row_or_refused(read):
    assert read("c.tsv", "7\tfirst\n8\tsecond\n")[0] == {"7": "first", "8": "second"}
    for name, content in (("c.csv", "7,first\n"), ("c.tsv", "7\ta\tb\n")):
        with pytest.raises(InputError, match=r"no header with a known name: 7, .*--columns"):
            read(name, content)


def test_columns_without_a_header_can_be_named(read):
    colbert = '0\t"A" passage\tTitle\n1\tB\t\n'
    assert read("collection.tsv", colbert, columns=("id", "text", "title"))[0] == {
        "0": 'Title "A" passage',
        "1": "B",
    }
    docs = "D1\thttps://x\tTitle\tBody\nD2\thttps://y\t\tB\tmore\n"
    passages, rejects = read("docs.tsv", docs, columns=("id", "url", "title", "text"))
    assert (passages, rejects) == ({"D1": "Title Body"}, {2: "5 columns instead of 4"})
    plain = '7,"first, quoted"\n8,second\n'
    assert read("c.csv", plain, columns=("id", "text"))[0] == {"7": "first, quoted", "8": "second"}
    named = read("c.csv", plain, columns=("key", "body"), id="key")[0]
    assert named == {"7": "first, quoted", "8": "second"}


def test_columns_that_do_not_fit_the_file_are_refused(read):
    with pytest.raises(InputError, match="has 3 columns, --columns names 2: 7, a, b"):
        read("c.tsv", "7\ta\tb\n", columns=("id", "text"))
    with pytest.raises(InputError, match=r"is a header: id, text\. Leave out --columns"):
        read("c.tsv", "id\ttext\n7\ta\n", columns=("id", "text"))
    with pytest.raises(InputError, match=r"no id field .*; it has key, text"):
        read("c.tsv", "7\ta\n", columns=("key", "text"))


def test_a_message_never_prints_a_document(read):
    with pytest.raises(InputError) as error:
        read("c.tsv", f"1\tu\t{'x' * 30_000}\ty{'z' * 30_000}\n")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("name", "content", "remedy"),
    [
        ("c.csv", "id;text\n1;a\n", "separated by semicolons, not by commas: write it with commas"),
        ("c.csv", "id\ttext\n1\ta\n", "separated by tabs, not by commas: let its name end in .tsv"),
        ("c.tsv", "id,text\n1,a\n", "separated by commas, not by tabs: let its name end in .csv"),
        ("c.tsv", "# made today\n1\ta\n", "It has no tabs"),
    ],
)
def test_another_delimiter_is_named(read, name, content, remedy):
    with pytest.raises(InputError, match=remedy):
        read(name, content)


def test_another_order_of_columns_is_another_plan(tmp_path):
    file = tmp_path / "c.tsv"
    file.write_text("1\ta\tb\n")

    def plan(**options):
        return plan_shards(
            expand_inputs([str(file)], None), shard_size=1, fields=FieldOptions(**options)
        ).hash

    first = plan(columns=("id", "title", "text"))
    assert plan(columns=("id", "title", "text")) == first
    assert plan(columns=("id", "text", "title")) != first
    assert plan(columns=("id", "title", "text"), quoting=True) != first


def test_the_plan_says_how_each_file_is_read(tmp_path):
    for name, content in {
        "a.tsv": "1\ta\n",
        "b.tsv": "2\tb\n",
        "c.tsv": "id\ttext\n1\ta\n",
        "d.csv": "id,text,Title\n1,a,t\n",
        "e.jsonl": jsonl({"_id": "1", "text": "a"}),
    }.items():
        (tmp_path / name).write_text(content)
    files = expand_inputs([f"{tmp_path}/*"], None)
    plan = plan_shards(files, shard_size=1)
    expected = (
        (" and 1 more: the first line is a row; the columns are id and text", "--quoting if"),
        ("the first line is the header; id from id", "--no-quoting if quotes"),
        ("title from Title", "quoted cells may span lines (--no-quoting"),
        ("id from _id, text from text, title from title where a row has one", "--id-field"),
    )
    assert len(plan.readings) == len(expected)
    for reading, parts in zip(plan.readings, expected, strict=True):
        assert all(part in reading for part in parts), reading


# Line ends, byte order marks, encodings


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r\r\n"])
def test_a_lone_carriage_return_is_a_character_of_its_cell(read, end):
    exact = {"1": "a\rb", "2": "c\r\nd", "3": "e"}
    content = f'id,text,n{end}1,a\rb,0{end}2,"c\r\nd",0{end}3,e,0{end}'
    assert read("c.csv", content) == (exact, {})
    content = f"1\ta\rb{end}2\tc{end}"
    assert read("c.tsv", content) == ({"1": "a\rb", "2": "c"}, {})
    content = f'id\ttext{end}1\t"a\r""b"{end}2\tc{end}'
    assert read("c.tsv", content) == ({"1": 'a\r"b', "2": "c"}, {})


def test_a_byte_order_mark_is_no_part_of_a_name_or_an_id(read):
    exact = ({"1": "a", "2": "b"}, {})
    for name, content, options in (
        ("c.csv", '"id","text"\n"1","a"\n"2","b"\n', {}),
        ("c.tsv", '"id"\t"text"\n1\ta\n2\tb\n', {}),
        ("c.tsv", "1\ta\n2\tb\n", {}),
        ("c.csv", '"1","a"\n"2","b"\n', {"columns": ("id", "text")}),
        ("c.jsonl", jsonl({"id": "1", "text": "a"}, {"id": "2", "text": "b"}), {}),
    ):
        assert read(name, content.encode("utf-8-sig"), **options) == exact
    later = "1\ta\n\ufeff2\tb\n"  # here the character is what was written
    assert read("c.tsv", later)[0] == {"1": "a", "\ufeff2": "b"}


def test_a_line_of_nothing_but_delimiters_is_a_row(read):
    passages, rejects = read("c.tsv", "id\ttext\n1\ta\n\t\n \t \n\n2\tb\n")
    assert passages == {"1": "a", "2": "b", " ": ""}
    assert list(rejects) == [3]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x1c", "\v", "\f", "\0"])
def test_only_a_line_feed_ends_a_line(read, separator):
    text = f"a{separator}b"
    assert read("c.jsonl", jsonl({"id": "1", "text": text}))[0] == {"1": text}
    assert read("c.tsv", f"1\t{text}\n")[0] == {"1": text}
    assert read("c.csv", f"id,text\n1,{text}\n")[0] == {"1": text}


# What is no corpus at all

CSV = b"id,text\n1,a\n"
PACKED = gzip.compress(CSV, mtime=0)  # as a parameter it must be the same in every process
ROWS = [{"id": "1", "text": "a"}, {"id": "2", "text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "what", "mended"),
    [
        ("c.csv", CSV.decode().encode("utf-16"), "UTF-16 .*iconv", CSV),
        ("c.csv", CSV.decode().encode("utf-16-le"), "UTF-16: .*iconv", CSV),
        ("c.csv", CSV.decode().encode("utf-32"), "UTF-32: .*iconv", CSV),
        ("c.csv.gz", gzip.compress(PACKED, mtime=0), "compressed twice", PACKED),
        ("c.csv", CSV.replace(b"\n", b"\r"), r"carriage returns alone: .*tr '\\r' '\\n'", CSV),
        ("c.jsonl", json.dumps(ROWS).encode(), r"one JSON array: .*jq -c '\.\[\]'", None),
        ("c.jsonl", json.dumps(ROWS, indent=2).encode(), "one JSON array", None),
        ("c.jsonl", b"[\n" + jsonl(*ROWS)[:-1].encode() + b"\n]\n", "one JSON array", None),
        ("c.jsonl", json.dumps(ROWS[0], indent=2).encode(), "several lines: .*jq -c", None),
        (
            "c.tsv",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "git lfs pull",
            None,
        ),
        ("c.tsv", b"../.git/annex/objects/x/y\n", "git annex get", None),
        ("c.jsonl", b"\n<!DOCTYPE html>\n<html>\n", "web page: download", None),
        ("c.jsonl", b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code>', "is XML", None),
    ],
)
def test_what_is_no_corpus_is_refused_by_its_name(read, name, content, what, mended):
    with pytest.raises(InputError, match=what):
        read(name, content)
    if mended:
        assert read(name, mended)[0] == {"1": "a"}
