"""Which files an input stands for: paths, globs, folders, chains and URLs."""

import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path

import fsspec
import huggingface_hub
import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from pipeline.corpus.access import absolute
from pipeline.corpus.inputs import expand_inputs, named_format
from pipeline.corpus.passages import FieldOptions, Passage
from pipeline.corpus.shards import ShardReader, plan_shards
from pipeline.estimate.sources import open_sources
from pipeline.run.job import EncodeJob
from pipeline.run.kept_plan import KeptPlan
from tests.support.file_server import Ranges, WholeFiles, serve_files
from tests.support.hub_server import DATASET, Hub
from tests.support.s3_server import serve as serve_s3

ROW = '{"id": "a", "text": "t"}\n'
MANY = "".join(json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(300))
NOBODY = 65534


def write(folder, *names, content=ROW):
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def found(given, folder="", format=None, **options):
    files = expand_inputs([str(given)], options or None, format)
    start = f"{folder}/" if folder else ""
    return [(f.path.removeprefix(start), f.format) for f in files]


def paths(given, folder="", format=None):
    return [path for path, _ in found(given, folder, format)]


def passages(*inputs, format=None, shard_size=100):
    """The passages of inputs; shards are read backwards, so that no file is read in one go."""
    files = expand_inputs([str(i) for i in inputs], None, format)
    plan = plan_shards(files, shard_size=shard_size, fields=FieldOptions(format=format))
    reader, rows = ShardReader(), {}
    for shard in reversed(plan.shards):
        rows[shard.number], rejects, _ = reader.read(shard)
        assert not rejects
    return [p for number in sorted(rows) for p in rows[number]]


def sampled(given):
    """The number of rows that an estimate reads of an input in 7 blocks, the last one first."""
    (file,) = expand_inputs([given], None)
    (source,) = open_sources(file, FieldOptions(), None)
    return sum(len(list(source.read(k, 7)[1])) for k in reversed(range(7)))


EXPECTED = [Passage(f"d{i}", f"text {i}") for i in range(300)]


def spark(folder):
    """What Spark leaves in a folder."""
    write(folder, "_SUCCESS", "._SUCCESS.crc", ".part-0.json.crc", "_temporary/0/part-9.json")
    write(folder, "part-00001-ab.c000.json", "part-00000-ab.c000.json")
    (folder / "part-00002-ab.c000.json.gz").write_bytes(gzip.compress(ROW.encode()))
    write(folder, "part-00003-ab.c000.json", content="")  # an empty partition
    return [f"part-0000{i}-ab.c000.json" + (".gz" if i == 2 else "") for i in range(4)]


def test_the_folder_that_spark_wrote_is_read_without_its_marks(tmp_path):
    parts = spark(tmp_path / "out")
    for given_ in ("out", "out/", "out/*", "out/part-*", "*", "**", "out/**"):
        assert paths(tmp_path / given_, tmp_path / "out") == parts, given_
    assert len(passages(tmp_path / "out")) == 3


def test_what_begins_with_a_mark_is_read_if_it_is_asked_for(tmp_path):
    write(tmp_path, "_part.jsonl", ".part.jsonl", "_d/a.jsonl", ".d/_b.jsonl")
    for given_ in ("_part.jsonl", "_*.jsonl", ".part.jsonl", ".*.jsonl", "_d", ".d/_*", "_*/*"):
        assert len(paths(tmp_path / given_)) == 1, given_


def test_names_without_a_format_are_read_as_format_says(tmp_path):
    write(tmp_path, "out/part-00000", "out/part-00001", "out/_SUCCESS")
    with pytest.raises(InputError, match=r"part-00000 has no known format.*--format jsonl, csv"):
        paths(tmp_path / "out")
    for given_ in ("out", "out/part-*"):
        assert [format for _, format in found(tmp_path / given_, format="jsonl")] == ["jsonl"] * 2
    assert len(passages(tmp_path / "out/part-*", format="jsonl")) == 2


def test_format_serves_where_a_name_does_not_tell(tmp_path):
    pq.write_table(pa.table({"id": ["p"], "text": ["x"]}), tmp_path / "a.parquet")
    write(tmp_path, "part-0")
    assert found(tmp_path, tmp_path, "jsonl") == [("a.parquet", "parquet"), ("part-0", "jsonl")]
    write(tmp_path, "tabs.csv")
    for given_, format, message in (
        ("tabs.csv", "tsv", "--format tsv has no effect: .*tabs.csv. Leave it out, or rename"),
        ("part-0", "json", "--format 'json' is not one of jsonl, csv, tsv, parquet"),
        ("part-0", "lance", "--format 'lance' is not one of"),
    ):
        with pytest.raises(InputError, match=message):
            paths(tmp_path / given_, format=format)
    (tmp_path / "tabs.csv").rename(tmp_path / "tabs.tsv")  # the remedy
    assert found(tmp_path / "tabs.tsv", tmp_path) == [("tabs.tsv", "tsv")]


def test_format_belongs_to_the_plan_that_is_kept(tmp_path):
    write(tmp_path, "part-0", content="id,text\na,b\n")

    def kept(format):
        job = EncodeJob(
            inputs=(str(tmp_path / "part-0"),), uri=str(tmp_path / "t.lance"), model="",
            fields=FieldOptions(format=format),
        )  # fmt: skip
        return KeptPlan(job)

    plan = plan_shards(kept("csv").files, shard_size=1000)
    kept("csv").write(plan)
    assert kept("csv").read() == plan
    assert kept("jsonl").read() is None


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("a.json.gz", "jsonl"), ("A.JSONL.GZ", "jsonl"), ("a.pq", "parquet"), ("a.CSV", "csv"),
        ("https://h/c.jsonl.gz?sig=a/b.csv", "jsonl"), ("zip://d/c.tsv::x.zip", "tsv"),
        ("simplecache::https://h/c.csv?x#y", "csv"), ("s3://b/t.lance/", "lance"),
        ("a.parquet.gz", None), ("jsonl", None), ("a.jsonl.bz2", None), ("part-0", None),
    ],
)  # fmt: skip
def test_a_name_tells_its_format(name, format):
    assert named_format(name) == format


def test_a_folder_is_read_with_all_below_that_has_a_format(tmp_path, caplog):
    write(tmp_path, "b/deep/x.jsonl", "a/y.csv", "README.md", "a/.git/z.jsonl", "a/LICENSE")
    lance.write_dataset(pa.table({"id": ["l"], "text": ["x"]}), tmp_path / "b/t.lance")
    assert paths(tmp_path, tmp_path) == ["a/y.csv", "b/deep/x.jsonl", "b/t.lance"]
    assert "README.md" in caplog.text and "a/LICENSE" in caplog.text
    with pytest.raises(InputError, match=r"README.md has no known format"):
        paths(tmp_path / "*.md")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no file in .*empty"):
        paths(tmp_path / "empty")


def test_tables_match_globs_and_are_not_looked_into(tmp_path):
    for name in ("a", "b"):
        lance.write_dataset(pa.table({"id": [name], "text": ["x"]}), tmp_path / f"d/{name}.lance")
    for given_ in ("d/*.lance", "d/*", "d", "**/*.lance", "d/**", "d/[ab].lance"):
        assert paths(tmp_path / given_, tmp_path) == ["d/a.lance", "d/b.lance"], given_
    assert passages(tmp_path / "d/*.lance") == [Passage("a", "x"), Passage("b", "x")]


def test_the_table_that_is_written_is_no_input(tmp_path):
    write(tmp_path, "c.jsonl")
    lance.write_dataset(pa.table({"id": ["l"], "text": ["x"]}), tmp_path / "t.lance")
    job = EncodeJob(inputs=(str(tmp_path),), uri=str(tmp_path / "t.lance"), model="")
    assert [f.path for f in job.files()] == [str(tmp_path / "c.jsonl")]


ODD_NAMES = ["docs[1].jsonl", "what?.jsonl", "a*b.jsonl", "[!x].jsonl", "x{1,2}.jsonl", "50%.jsonl"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_with_characters_of_patterns_are_names_first(tmp_path, name):
    write(tmp_path, name, "docs1.jsonl", f"{name}.d/in.jsonl")
    assert paths(tmp_path / name, tmp_path) == [name]
    assert paths(tmp_path / f"{name}.d/*.jsonl", tmp_path) == [f"{name}.d/in.jsonl"]
    assert paths(tmp_path / f"{name}.d", tmp_path) == [f"{name}.d/in.jsonl"]
    assert passages(tmp_path / name) == [Passage("a", "t")]


@given(
    st.lists(
        st.text(st.sampled_from("ab[]*?!-%# é{}"), min_size=1, max_size=6), min_size=1, unique=True
    )
)
def test_every_name_of_a_folder_can_be_given_and_is_found(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("names")
    write(folder, *(f"{name}.jsonl" for name in names))
    assert sorted(paths(folder, folder)) == sorted(f"{name}.jsonl" for name in names)
    for name in names:
        assert paths(folder / f"{name}.jsonl", folder) == [f"{name}.jsonl"]
    shutil.rmtree(folder)


def test_links_count_as_what_they_point_to(tmp_path):
    write(tmp_path, "real/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "real/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "real/c.jsonl").symlink_to(tmp_path / "elsewhere/b.jsonl")
    assert paths(tmp_path / "real", tmp_path) == [
        "real/a.jsonl", "real/c.jsonl", "real/link/b.jsonl"
    ]  # fmt: skip
    assert paths(tmp_path / "real/*/*.jsonl", tmp_path) == ["real/link/b.jsonl"]
    (tmp_path / "real/lost.jsonl").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"cannot read .*nowhere|cannot read .*lost.jsonl"):
        paths(tmp_path / "real")


@contextmanager
def as_nobody():
    """Root may read everything: give that up for a moment."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_folder_that_cannot_be_read_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, "open/a.jsonl", "open/shut/b.jsonl", "open/shut/c/d.jsonl")
        folder.chmod(0o755)
        (folder / "open/shut").chmod(0)
        try:
            with as_nobody():
                assert paths(folder / "open/*.jsonl", folder) == ["open/a.jsonl"]
                for given_ in (
                    "open/shut/b.jsonl", "open/shut/*.jsonl", "open/shut", "open/shut/c/*",
                    "open", "open/*", "**/*.jsonl",
                ):  # fmt: skip
                    with pytest.raises(InputError, match=r"cannot read .*Permission denied.*shut"):
                        paths(folder / given_)
        finally:
            (folder / "open/shut").chmod(0o755)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for given_, message in (
        (tmp_path / "pipe.jsonl", "no regular file: save its content"),
        (tmp_path, "pipe.jsonl is no regular file"),
        ("", "an input is empty"),
        (" ", "an input is empty"),
        ("nope://x/c.jsonl", "cannot read nope://x/c.jsonl: Protocol not known: nope"),
        (tmp_path / "none/*.jsonl", "no file matches"),
        (tmp_path / "a::b.jsonl", "joins URLs.* Rename the file"),
    ):
        with pytest.raises(InputError, match=message):
            paths(given_)


def test_a_path_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "c.jsonl")
    assert paths("~/c.jsonl") == paths("~/*.jsonl") == [str(tmp_path / "c.jsonl")]
    assert absolute("~/t.lance") == str(tmp_path / "t.lance")
    assert absolute("zip://c.jsonl::~/c.zip") == f"zip://c.jsonl::{tmp_path}/c.zip"


@pytest.fixture
def beir(tmp_path):
    """A zip archive as BEIR ships it."""
    with zipfile.ZipFile(tmp_path / "scifact.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scifact/corpus.jsonl", MANY)
        archive.writestr("__MACOSX/scifact/._corpus.jsonl", "x")
    return tmp_path / "scifact.zip"


def test_files_in_a_zip_archive_are_read(beir, monkeypatch):
    inside = f"zip://scifact/corpus.jsonl::{beir}"
    for given_ in (inside, f"zip://scifact/*.jsonl::{beir}", f"zip://scifact::{beir}",
                   f"zip://**/corpus.jsonl::{beir}", f"zip::{beir}"):  # fmt: skip
        assert paths(given_) == [inside], given_
    monkeypatch.chdir(beir.parent)  # workers have another working directory
    assert paths("zip://scifact/corpus.jsonl::scifact.zip") == [inside]
    assert passages(inside) == EXPECTED
    for given_, message in (
        (f"zip://nope.jsonl::{beir}", "no file matches"),
        (f"zip://c.jsonl::{beir}.none", "cannot read .*No such file"),
    ):
        with pytest.raises(InputError, match=message):
            paths(given_)


def test_an_archive_is_refused_with_the_names_in_it(beir):
    with pytest.raises(InputError, match=r"is an archive: name the files in it") as refused:
        paths(beir)
    assert passages(str(refused.value).split()[-1]) == EXPECTED


def test_a_chain_keeps_all_its_parts(beir):
    with fsspec.open("memory://m/scifact.zip", "wb") as file:
        file.write(beir.read_bytes())
    for given_ in (
        "zip://scifact/corpus.jsonl::memory://m/scifact.zip",
        "simplecache::zip://scifact/corpus.jsonl::memory://m/scifact.zip",
        "zip://scifact/corpus.jsonl::simplecache::memory://m/scifact.zip",
    ):
        assert paths(given_) == [given_]
        assert paths(given_.replace("corpus", "c*")) == [given_]
        assert passages(given_) == EXPECTED
        assert sampled(given_) == 300


class Hosted(LocalFileSystem):
    """A store whose URLs name a host, which its paths do not."""

    protocol = "hosted"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("hosted://user@host"))


def test_the_host_of_a_store_stays_in_the_urls_of_what_is_found(tmp_path):
    fsspec.register_implementation("hosted", Hosted, clobber=True)
    write(tmp_path, "d/c.jsonl", content=MANY)
    url = f"hosted://user@host{tmp_path}/d/c.jsonl"
    for given_ in (url, url.replace("c.", "*."), url.replace("/c.jsonl", "/")):
        assert paths(given_) == [url]
    assert passages(url) == EXPECTED


def test_a_server_without_ranges_is_refused_before_encoding_with_the_url_that_works(beir):
    write(beir.parent, "c.jsonl", content=MANY)
    with serve_files(beir.parent, WholeFiles) as url:
        for given_ in (
            f"{url}/c.jsonl", f"{url}/*.jsonl", f"zip://scifact/corpus.jsonl::{url}/scifact.zip"
        ):  # fmt: skip
            with pytest.raises(InputError, match="sends whole files only") as refused:
                paths(given_)
            remedy = next(w for w in str(refused.value).split() if "simplecache::" in w).strip(",")
            assert paths(remedy) == [remedy]
            assert passages(remedy) == EXPECTED
            assert sampled(remedy) == 300
        assert passages(f"simplecache::{url}/*.jsonl") == EXPECTED
        with pytest.raises(InputError, match=r"no file matches .*none.jsonl"):
            paths(f"{url}/none.jsonl")


def test_a_server_with_ranges_is_read_in_place(beir):
    write(beir.parent, "c.jsonl", content=MANY)
    with serve_files(beir.parent, Ranges) as url:
        for given_ in (
            f"{url}/c.jsonl", f"{url}/c.jsonl?token=a/b", f"{url}/*.jsonl",
            f"zip://scifact/corpus.jsonl::{url}/scifact.zip",
        ):  # fmt: skip
            assert passages(given_) == EXPECTED, given_
            assert sampled(given_) == 300
    with pytest.raises(InputError, match=r"cannot read http.*c.jsonl: Cannot connect"):
        paths(f"{url}/c.jsonl")


@pytest.fixture
def s3(tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    with serve_s3(tmp_path / "s3") as server:
        write(server.folder / "bucket/d", "a.jsonl", "_SUCCESS", "e/b.jsonl", "e/.c.jsonl")
        yield server


def test_folders_globs_and_chains_of_a_store_are_expanded(s3):
    both = [("s3://bucket/d/a.jsonl", "jsonl"), ("s3://bucket/d/e/b.jsonl", "jsonl")]
    for given_ in ("s3://bucket/d", "s3://bucket/d/", "s3://bucket/d/**", "s3://bucket/**/*.jsonl"):
        assert found(given_, **s3.options) == both, given_
    assert found("simplecache::s3://bucket/d/*.jsonl", **s3.options) == [
        ("simplecache::s3://bucket/d/a.jsonl", "jsonl")
    ]


def test_a_store_without_keys_says_which_options_it_needs(s3):
    with pytest.raises(InputError, match=r"Unable to locate credentials.*aws_access_key_id") as no:
        found("s3://bucket/d/a.jsonl", aws_endpoint=s3.options["aws_endpoint"])
    needed = {name: s3.options[name] for name in ("aws_access_key_id", "aws_secret_access_key")}
    assert all(name in str(no.value) for name in needed)
    needed["aws_endpoint"] = s3.options["aws_endpoint"]
    assert found("s3://bucket/d/a.jsonl", **needed) == [("s3://bucket/d/a.jsonl", "jsonl")]


READ_IT = """
import sys
from pipeline.corpus.inputs import expand_inputs
from pipeline.corpus.shards import ShardReader, plan_shards

for given in sys.argv[1:]:
    plan = plan_shards(expand_inputs([given], None), shard_size=100)
    reader = ShardReader()
    rows = [len(reader.read(shard)[0]) for shard in reversed(plan.shards)]
    print(*(sorted({shard.path for shard in plan.shards})), sum(rows))
"""


def test_datasets_of_the_hub_are_read(tmp_path):
    write(tmp_path, "README.md", ".gitattributes", "data/c.jsonl", content=MANY)
    given_ = [f"{DATASET}{rest}" for rest in ("", "/data/c.jsonl", "/data", "/*/*.jsonl")]
    with serve_files(tmp_path, Hub) as url:
        done = subprocess.run(
            [sys.executable, "-c", READ_IT, *given_],
            env={**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path)},  # read at import
            capture_output=True, text=True,
        )  # fmt: skip
    pinned = f"{DATASET}@{Hub.commit}/data/c.jsonl"
    assert done.stdout.splitlines() == [f"{pinned} 300"] * 4, done.stderr


def test_the_hub_offline_is_the_cause_that_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for given_ in (f"{DATASET}/c.jsonl", f"{DATASET}/*.jsonl", DATASET):
        with pytest.raises(InputError, match=r"cannot read hf:.* offline .*HF_HUB_OFFLINE"):
            paths(given_)
