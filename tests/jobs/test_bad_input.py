"""Everything users get wrong: a clear message, an exit code, and a good run on the same target."""

import contextlib
import gzip
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from backports import zstd

from jobs import cli
from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import IncompleteError
from kalm_encoder.table.location import Location
from pipeline.run import first_look
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.rejects import RejectStore
from pipeline.upkeep.delete import delete
from pipeline.upkeep.verify import verify
from pipeline.workers.local import in_process
from tests.conftest import make_texts, write_corpus

ODD_IDS = ["a\0b", "line\nbreak", 'it\'s "quoted"', "x" * 10_240, "') OR 1=1 --", "漢字", " "]


def kalm(monkeypatch, *arguments):
    """Run the command line in this process; return its exit code and all it printed."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["kalm", *map(str, arguments)])
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return code, out.getvalue()


@pytest.fixture
def encode(monkeypatch, model_dir, tmp_path):
    """`kalm encode` in this process, to `t.lance`."""

    def run_it(*inputs, model=model_dir, to=tmp_path / "t.lance", more=()):
        return kalm(
            monkeypatch, "encode", *inputs, "--to", to, "--model", model, "--workers", 0, *more
        )

    return run_it


@pytest.fixture
def good(tmp_path):
    return write_corpus(tmp_path / "good.jsonl", make_texts(12))


def assert_good_run(encode, good, **options):
    code, out = encode(good, **options)
    assert (code, "12 passages" in out) == (0, True), out


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = jsonl({"id": f"p{i}", "text": f"text {i}"} for i in range(500))
FILES = {
    "cut.jsonl.gz": (gzip.compress(ROWS)[:-300], "cannot read .*cut.jsonl.gz"),
    "cut.jsonl.zst": (zstd.compress(ROWS)[:-50], "cannot read .*cut.jsonl.zst"),
    "not.jsonl.gz": (b"plain text", "cannot read .*not.jsonl.gz"),
    "empty.jsonl": (b"", "no rows in .*empty.jsonl"),
    "blank.jsonl": (b"\n\n \n", "no rows in .*blank.jsonl"),
    "empty.parquet": (b"", "cannot read .*empty.parquet"),
    "fields.jsonl": (jsonl([{"key": 1, "body_text": "x"}]), "no id field .*--id-field"),
    "what.xml": (b"<x/>", "no known format"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_cannot_be_read(encode, good, tmp_path, name):
    content, message = FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    code, out = encode(file)
    assert code == 2, out
    assert re.search(f"kalm: error: .*{message}", out), out
    assert not (tmp_path / "t.lance").exists()
    assert_good_run(encode, good)


def test_a_parquet_file_cut_in_half(encode, good, tmp_path):
    file = tmp_path / "c.parquet"
    pq.write_table(pa.table({"id": ["a"] * 1000, "text": ["b"] * 1000}), file)
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    code, out = encode(file)
    assert (code, "cannot read" in out) == (2, True), out
    assert_good_run(encode, good)


@pytest.mark.parametrize("name", ["c.parquet", "c.lance"])
def test_one_bad_string_costs_its_own_row_and_rejects_shows_it(encode, monkeypatch, tmp_path, name):
    file, table = tmp_path / name, tmp_path / "t.lance"
    texts = pa.array([b"first", b"caf\xe9", b"last"]).view(pa.string())  # no writer checks it
    rows = pa.table({"id": ["a", "b", "c"], "text": texts})
    write = lance.write_dataset if name.endswith(".lance") else pq.write_table
    write(rows, file)
    model = ("--model", "kalm-demo", "--time-limit", 0)
    assert kalm(monkeypatch, "plan", file, *model)[0] == 0
    code, out = encode(file, more=["--max-rejected", 0.5])
    assert (code, "complete: 2 passages" in out) == (0, True), out
    code, out = kalm(monkeypatch, "rejects", table)
    assert re.search(rf"{name} line 2.* (not valid Unicode|not UTF-8)", out), out


@pytest.mark.parametrize(
    ("column", "values"), [("text", [1.5]), ("id", [True]), ("text", [["list"]])]
)
def test_columns_of_the_wrong_type(encode, good, tmp_path, column, values):
    file = tmp_path / "c.parquet"
    pq.write_table(pa.table({"id": ["a"], "text": ["b"], column: values}), file)
    code, out = encode(file)
    assert code == 2, out
    assert f"column '{column}' of" in out and "must hold strings" in out
    assert_good_run(encode, good)


def test_no_matching_file(encode, good, tmp_path):
    code, out = encode(tmp_path / "none*.jsonl")
    assert (code, "no file matches" in out) == (2, True), out
    assert_good_run(encode, good)


def test_rows_that_cannot_be_used_are_listed(encode, good, tmp_path, monkeypatch):
    """Null ids, undecodable bytes, a line of 200 MB: too many fail the run, each is listed."""
    file = tmp_path / "c.jsonl"
    with file.open("wb") as lines:
        lines.write(b'{"id": null, "text": "x"}\n{"id": "bytes", "text": "\xff\xfe"}\n')
        lines.write(b'{"id": "long", "text": "' + b"a" * 200_000_000 + b'"}\n')
        lines.write(jsonl({"id": f"p{i}", "text": "x"} for i in range(5)))
    code, out = encode(file)
    assert (code, "3 rows were rejected, 0 of 8 may be" in out) == (1, True), out
    assert not lance.dataset(str(tmp_path / "t.lance")).tags.list()
    code, out = kalm(monkeypatch, "rejects", tmp_path / "t.lance")
    assert code == 0
    for part in (
        "line 1: field 'id' holds no id", "line 2: not UTF-8",
        "line 3 id 'long': text of 200,000,000 characters", "3 rows rejected",
    ):  # fmt: skip
        assert part in out, out
    code, out = encode(file, more=("--max-rejected", 0.5))
    assert (code, "5 passages" in out) == (0, True), out
    assert_good_run(encode, good, more=("--new-generation",))
    assert kalm(monkeypatch, "publish", tmp_path / "t.lance")[0] == 0
    assert len(PassageTable.open(str(tmp_path / "t.lance"))) == 12


@pytest.mark.parametrize(("policy", "kept"), [("first", "one"), ("last", "three")])
def test_repeated_ids_within_and_across_shards_and_files(
    encode, tmp_path, monkeypatch, policy, kept
):
    monkeypatch.setattr(first_look, "MOST_ROWS", 1)  # as in a large corpus
    for name, texts in (("a.jsonl", ["one", "two"]), ("b.jsonl", ["other", "three"])):
        rows = [{"id": "other" if t == "other" else "same", "text": t} for t in texts]
        (tmp_path / name).write_bytes(jsonl(rows))
    files = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    code, out = encode(*files, more=("--shard-size", 1))
    assert code == 2, out
    assert "2 rows repeat an id: 'same'" in out and "--on-duplicate first or last" in out
    code, out = encode(*files, more=("--shard-size", 1, "--on-duplicate", policy))
    assert code == 0, out
    assert "2 rows with a repeated id were dropped" in out
    assert "encoded" not in out.replace("are encoded", ""), "nothing is encoded twice"
    rows = PassageTable.open(str(tmp_path / "t.lance")).dataset.to_table().to_pylist()
    assert {r["id"]: r["text"] for r in rows} == {"same": kept, "other": "other"}
    assert verify(str(tmp_path / "t.lance")).num_problems == 0
    code, out = encode(*files, more=("--on-duplicate", "maybe"))
    assert (code, "'maybe' is not one of error, first, last" in out) == (2, True)


def test_odd_ids_round_trip(encode, model_dir, tmp_path, monkeypatch):
    file = tmp_path / "c.jsonl"
    file.write_bytes(jsonl({"id": i, "text": f"text {n}"} for n, i in enumerate(ODD_IDS)))
    assert encode(file)[0] == 0
    uri = str(tmp_path / "t.lance")
    table = PassageTable.open(uri)
    for id in ODD_IDS:
        assert len(table.take([id])) == 1
    assert len(table.take(ODD_IDS[::-1])) == len(ODD_IDS)
    results = Reranker.open(uri, model=str(model_dir)).rerank("q", ODD_IDS)
    assert {r.id for r in results} == set(ODD_IDS)
    file.write_bytes(jsonl({"id": i, "text": f"new {n}"} for n, i in enumerate(ODD_IDS)))
    code, out = kalm(monkeypatch, "sync", file, "--to", uri, "--workers", 0)
    assert (code, f"{len(ODD_IDS)} changed, 0 new" in out) == (0, True), out
    assert delete(Location(uri), ODD_IDS[:3]) == 3
    assert len(PassageTable.open(uri).take(ODD_IDS[3:])) == len(ODD_IDS) - 3
    assert verify(uri).num_problems == 0


@pytest.mark.parametrize("what", ["changed", "vanished"])
def test_a_file_that_changes_between_plan_and_read(model_dir, good, tmp_path, what):
    original = good.read_bytes()
    job = EncodeJob(
        inputs=(str(good),), uri=str(tmp_path / "t.lance"), model=str(model_dir), shard_size=4
    )

    def meddle(config, shards):
        if what == "changed":
            good.write_bytes(original.replace(b"p9", b"q9"))
        else:
            good.unlink()
        yield from in_process(config, shards)

    with pytest.raises(IncompleteError, match=r"changed after it was planned|No such file") as seen:
        run(job, meddle)
    assert seen.value.exit_code == 1
    good.write_bytes(original)
    assert run(job, in_process).num_rows == 12


@pytest.mark.parametrize("target", ["file.txt/t.lance", "/proc/none/t.lance"])
def test_a_target_that_cannot_be_written(encode, good, tmp_path, target):
    (tmp_path / "file.txt").write_text("a file")
    code, out = encode(good, to=tmp_path / target)
    assert code == 2, out
    assert "cannot write safely to" in out
    assert_good_run(encode, good)


def test_a_disk_that_is_full(monkeypatch, model_dir, good, tmp_path):
    """The system refuses to let any file grow beyond 20 KB: data files do not fit."""
    arguments = [
        "encode", str(good), "--to", str(tmp_path / "t.lance"), "--model", str(model_dir),
        "--workers", "0", "--store-dtype", "float32",
    ]  # fmt: skip
    command = [sys.executable, "-m", "jobs", *arguments]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1, done.stderr
    assert "shards failed" in done.stderr and "File too large" in done.stderr, done.stderr
    code, out = kalm(monkeypatch, *arguments)
    assert (code, "12 passages" in out) == (0, True), out


def test_a_file_system_that_is_full(encode, good, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine allows no mount")
    try:
        filler = disk / "filler"
        filler.write_bytes(b"x" * 570_000)
        code, out = encode(good, to=disk / "t.lance")
        assert code in (1, 2), out
        assert "No space left" in out or "disk is full" in out, out
        filler.unlink()
        assert_good_run(encode, good, to=disk / "t.lance")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def broken_model(model_dir, folder, how):
    shutil.copytree(model_dir, folder)
    weights = next(folder.glob("*.safetensors"))
    if how == "missing":
        weights.unlink()
    elif how == "corrupt":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif how == "not finite":
        tensors = safetensors.torch.load_file(weights)
        for name in tensors:
            if "encoder" in name and name.endswith("norm.weight"):
                tensors[name].fill_(float("nan"))
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
    else:
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        model = tokenizer["model"]
        model["vocab"]["gone"] = model["vocab"].pop("yes", 0)
        model["merges"] = [m for m in model["merges"] if "yes" not in (*m, "".join(m))]
        tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "yes"]
        file.write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("missing", 2, "safetensors"),
        ("corrupt", 2, "safetensors"),
        ("yes", 2, "'yes'"),
        ("not finite", 1, "rows were rejected, 0 of 12 may be"),
    ],
)
def test_models_that_cannot_be_used(encode, good, model_dir, tmp_path, how, code, message):
    model = broken_model(model_dir, tmp_path / "broken", how)
    got, out = encode(good, model=model)
    assert got == code, out
    assert message in out, out
    if how == "not finite":
        (reject,) = RejectStore(Location(str(tmp_path / "t.lance"))).read()[:1]
        assert "states are not finite" in reject.reason
        assert_good_run(encode, good, more=("--new-generation",))
    else:
        assert_good_run(encode, good)


def test_a_failed_first_attempt_does_not_block_the_place(encode, good, model_dir, tmp_path):
    """Nothing was committed, so mended input may use the same table."""

    def fails(config, shards):
        raise IncompleteError("the cluster is gone")
        yield

    job = EncodeJob(inputs=(str(good),), uri=str(tmp_path / "t.lance"), model=str(model_dir))
    with pytest.raises(IncompleteError):
        run(job, fails)
    assert run(replace(job, ratios=(8,)), in_process).num_rows == 12
