"""A file that is planned in blocks has the ranges, or the error, of one that is read at once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from pipeline.corpus.access import open_text
from pipeline.corpus.inputs import InputFile
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.scans import open_file
from pipeline.corpus.text_blocks import bounds_of, count, cut_shards, cuts, joined
from pipeline.corpus.text_detect import detect

BOM = b"\xef\xbb\xbf"
HEADER = b"id\ttext\n"


def in_blocks(path, size, shard_size, block_bytes, read_bytes):
    file = InputFile(str(path), path.suffix[1:])
    _, cells, header = detect(file, FieldOptions(), None)
    first_line = 1 + header.count(b"\n")
    with open_text(str(path), None) as stream:
        bounds = bounds_of(len(header), size, block_bytes)
        counts = [count(stream, start, end, cells, read_bytes) for start, end in bounds]
        parts = [
            cut_shards(stream, part, cells, str(path), shard_size, read_bytes)
            for part in cuts(counts, len(header), first_line, shard_size)
        ]
    return joined(str(path), parts, counts)


def outcome(plan, *args):
    try:
        return plan(*args)
    except InputError as error:
        return str(error)


def check(folder, name, content, shard_size, block_bytes, read_bytes):
    path = folder / name
    path.write_bytes(content)
    file = open_file(InputFile(str(path), path.suffix[1:]), None)
    whole = outcome(lambda: file.scan(shard_size, None, FieldOptions())[1])
    blocks = outcome(in_blocks, path, len(content), shard_size, block_bytes, read_bytes)
    assert blocks == whole


def lines(*some):
    texts = st.sampled_from([b"", b" ", b"\t\t", b"\v", b"x" * 50, *some]) | st.binary(max_size=9)
    line = st.builds(bytes.__add__, texts, st.sampled_from([b"\n", b"\n", b"\r\n"]))
    return st.builds(
        lambda found, last: b"".join(found) + last,
        st.lists(line, max_size=30),
        st.just(b"") | texts,
    )


sizes = st.tuples(st.integers(1, 5), st.integers(1, 60), st.integers(1, 40))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("blocks")


@given(st.sampled_from([b"", BOM]), lines(b'{"_id": "1", "text": "a"}', BOM), sizes)
@example(b"", b"", (1, 1, 1))
@example(b"", b"\n \n\r\n\n", (1, 2, 1))
@example(b"", b"\n\n\n{}\n\n{}\n\n\n{}", (1, 2, 1))
@settings(max_examples=150)
def test_jsonl_in_blocks_is_jsonl(folder, begin, rows, sizes):
    check(folder, "c.jsonl", begin + rows, *sizes)


@given(
    st.sampled_from([HEADER, b"\n" + HEADER, BOM + HEADER, b"1\tno header\n"]),
    lines(b"1\ta", b'2\t"a ""b"""', b'"3"\ta "b"', b'4\t"open', b'5\t"a" b', b'6\t"\\"'),
    sizes,
)
@example(HEADER, b'1\ta\n\n2\tb\n3\t"a"b"\n', (2, 7, 1))
@settings(max_examples=150)
def test_tsv_in_blocks_is_tsv(folder, begin, rows, sizes):
    check(folder, "c.tsv", begin + rows, *sizes)


def test_a_file_that_is_written_to_meanwhile_is_no_plan(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"{}\n" * 10)
    with open_text(str(path), None) as stream:
        counts = [count(stream, start, end, None) for start, end in bounds_of(0, 30, 10)]
    path.write_bytes(b"{}\n" * 8)
    with open_text(str(path), None) as stream, pytest.raises(InputError, match="while it was pl"):
        [cut_shards(stream, part, None, str(path), 3) for part in cuts(counts, 0, 1, 3)]
    path.write_bytes(b"{}\n" * 7 + b"{ }\n" * 3)
    with open_text(str(path), None) as stream:
        parts = [cut_shards(stream, part, None, str(path), 3) for part in cuts(counts, 0, 1, 3)]
        assert len(joined(str(path), parts, counts)) == 4  # rows are where they were
    with pytest.raises(InputError, match=r"c\.jsonl changed while it was planned"):
        joined(str(path), [parts[0], *parts[2:]], counts)
