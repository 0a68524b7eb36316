"""How files are opened: compression by content, damaged and foreign bytes, errors of libraries."""

import bz2
import gzip
import json
import lzma
import struct
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

from kalm_encoder.errors import InputError, MismatchError
from pipeline.corpus.access import open_text, readable
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.passages import FieldOptions
from pipeline.corpus.shards import ShardReader, plan_shards
from pipeline.estimate.sources import open_sources

TEXT = "".join(
    json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(5000)
).encode()
SKIPPED = struct.pack("<II", 0x184D2A50, 4) + b"skip"


def long_window(raw, log=28):
    """What `zstd --long=28` writes: a frame that needs 256 MiB to be read."""
    options = {zstd.CompressionParameter.window_log: log}
    stream = zstd.ZstdCompressor(options=options)  # one that does not know the size beforehand
    return stream.compress(raw) + stream.flush()


def ids(file):
    plan = plan_shards(expand_inputs([str(file)], None), shard_size=999)
    reader = ShardReader()
    return [p.id for shard in plan.shards for p in reader.read(shard)[0]]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.jsonl.zst"])
@pytest.mark.parametrize(
    "pack",
    [gzip.compress, zstd.compress, long_window, lambda raw: SKIPPED + zstd.compress(raw),
     lambda raw: gzip.compress(raw[:999]) + gzip.compress(raw[999:])],
    ids=["gzip", "zstd", "long window", "skippable frame", "two members"],
)  # fmt: skip
def test_the_first_bytes_tell_how_a_file_is_compressed(tmp_path, name, pack):
    file = tmp_path / name
    file.write_bytes(pack(TEXT))
    assert ids(file) == [f"d{i}" for i in range(5000)]
    (found,) = expand_inputs([str(file)], None)
    (source,) = open_sources(found, FieldOptions(), None)
    assert source.in_order and source.size == len(TEXT)


def test_a_long_window_needs_more_than_the_limit_of_zstd(tmp_path):
    with pytest.raises(zstd.ZstdError, match="too much memory"):
        zstd.decompress(long_window(TEXT))


def flipped(raw):
    """The bytes with one of them changed in their middle."""
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 0xFF]) + raw[middle + 1 :]


DAMAGES = {
    "cut": lambda raw: raw[: len(raw) // 2],
    "flipped": flipped,
    "zeros": lambda raw: raw[:40] + bytes(len(raw) - 40),
    "checksum": lambda raw: raw[:-8] + bytes(8),
    "garbage": lambda raw: raw + b"garbage after the end",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_compression_is_named_with_cause_and_remedy(tmp_path, suffix, damage):
    pack = {"gz": gzip.compress, "zst": lambda raw: zstd.compress(raw, options=CHECKED)}[suffix]
    file = tmp_path / f"c.jsonl.{suffix}"
    file.write_bytes(DAMAGES[damage](pack(TEXT)))
    for use in (ids, sampled):
        with pytest.raises(InputError, match=rf"cannot read .*{file.name}: .+copy it again"):
            use(file)
    file.write_bytes(pack(TEXT))  # the remedy
    assert len(ids(file)) == 5000


CHECKED = {zstd.CompressionParameter.checksum_flag: 1}


def sampled(file):
    (found,) = expand_inputs([str(file)], None)
    (source,) = open_sources(found, FieldOptions(), None)
    return [row for k in range(3) for row in source.read(k, 3)[1]]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("content", [TEXT, b"PAR1", bz2.compress(TEXT), zlib.compress(TEXT)])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"c.jsonl.{suffix}"
    file.write_bytes(content)
    for use in (ids, sampled):
        with pytest.raises(InputError, match=rf"{file.name}(: it is not| is) compressed with"):
            use(file)
    if content is TEXT:
        assert len(ids(file.rename(tmp_path / "c.jsonl"))) == 5000  # the remedy


@pytest.mark.parametrize("name", ["c.jsonl", "c.tsv", "c.csv.gz", "c.parquet"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (bz2.compress(TEXT), "compressed with bzip2: decompress it: bunzip2"),
        (lzma.compress(TEXT), "compressed with xz: decompress it: unxz"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS: run"),
        (b"<!DOCTYPE html><p>404", "a web page: download the file itself"),
    ],
    ids=["bz2", "xz", "lfs", "html"],
)
def test_what_is_another_kind_of_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is a?.*{message}"):
        ids(tmp_path / name)


@pytest.mark.parametrize("suffix", ["jsonl", "tsv.gz", "csv"])
def test_parquet_under_another_name_is_named_and_can_be_renamed(tmp_path, suffix):
    file = tmp_path / f"c.{suffix}"
    pq.write_table(pa.table({"id": ["a"], "text": ["t"]}), file)
    with pytest.raises(InputError, match=r"is a Parquet file: give it a name .*\.parquet"):
        ids(file)
    assert ids(file.rename(tmp_path / "c.parquet")) == ["a"]


def test_errors_of_any_library_are_about_the_file_and_our_mistakes_are_not():
    class LibraryError(Exception):
        pass

    for error in (LibraryError("no"), OSError("no"), EOFError("no"), ValueError("no")):
        with pytest.raises(InputError, match="cannot read x: no"), readable("x"):
            raise error
    for error in (TypeError("no"), AttributeError("no"), MismatchError("field", "no")):
        with pytest.raises(type(error), match=r"^no$"), readable("x"):
            raise error


def test_an_empty_file_is_no_damage(tmp_path):
    for name in ("c.jsonl", "c.jsonl.gz", "c.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        with open_text(str(tmp_path / name), None) as stream:
            assert stream.read() == b""
