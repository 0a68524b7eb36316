"""The Hugging Face hub as a source of a corpus and as a place for a table, against a stub of it.

The real hub stores large files by another protocol, which the stub does not speak.
"""

import json
import os
import subprocess
import sys

import lance
import pytest

from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.file_server import serve_files
from tests.support.hub_server import DATASET, Hub


@pytest.fixture
def hub(tmp_path):
    class OneHub(Hub):
        pass

    files = tmp_path / "hub"
    files.mkdir()
    with serve_files(files, OneHub) as url:
        OneHub.url, OneHub.files = url, files
        yield OneHub


@pytest.fixture
def kalm(hub, tmp_path):
    def run(*arguments, code=0):
        done = subprocess.run(
            [sys.executable, "-m", "jobs", *map(str, arguments)],
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "cache"),
                "HF_TOKEN": "of-nobody",
            },
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_a_corpus_of_the_hub_is_pinned_and_a_moved_one_is_refused(hub, kalm, model_dir, tmp_path):
    write_corpus(hub.files / "a.jsonl", make_texts(6))
    table = tmp_path / "t.lance"
    encode = ["encode", f"{DATASET}/*.jsonl", "--to", table, "--model", model_dir, "--workers", 0]
    kalm(*encode)
    first = hub.commit
    metadata = lance.dataset(str(table)).schema.metadata
    assert metadata[b"kalm.hub"].decode() == f"datasets/owner/name@{first}"
    assert "already complete" in kalm(*encode)
    hub.commit = "1" * 40
    assert f"begun from datasets/owner/name@{first}" in kalm(*encode, code=2)
    encode[1] = f"{DATASET}@{first}/*.jsonl"
    assert "already complete" in kalm(*encode)
    write_corpus(hub.files / "a.jsonl", make_texts(7))
    sync = ["sync", f"{DATASET}/*.jsonl", "--to", table, "--model", model_dir, "--workers", 0]
    assert "1 new" in kalm(*sync)
    metadata = lance.dataset(str(table)).schema.metadata
    assert metadata[b"kalm.hub"].decode() == f"datasets/owner/name@{'1' * 40}"


def test_a_table_goes_to_the_hub_and_comes_back(hub, kalm, model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(20))
    table = tmp_path / "t.lance"
    encode_table(model_dir, corpus, table, shard_size=5)
    there = f"{DATASET}/tables/t.lance"
    says = kalm("push", table, there)
    assert f"uploaded as {DATASET}@{hub.commit}/tables/t.lance" in says
    card = (hub.files / "README.md").read_text()
    for fact in ("kalm-preencode", "| passages | 20 |", "| ratios | 4 |", "0 problems", "float16"):
        assert fact in card
    assert str(model_dir) not in card
    ids = ["p1", "p3", "p7"]
    ask = ["--query", "where is a token", "--ids", ",".join(ids), "--json"]
    ours, theirs = ranked(kalm("rerank", table, *ask)), ranked(kalm("rerank", there, *ask))
    assert {result["id"] for result in ours} == set(ids)
    assert theirs == ours
    assert "20 rows checked, 0 problems" in kalm("verify", there)
    (hub.files / "README.md").write_text("# Our own card\n")
    kalm("delete", table, "--ids-file", _file(tmp_path, "p0"))
    kalm("push", table, there)
    assert "19 rows checked, 0 problems" in kalm("verify", there)
    assert (hub.files / "README.md").read_text() == "# Our own card\n"
    assert "| passages | 19 |" in (hub.files / "tables/t.lance/README.md").read_text()
    assert len(list((hub.files / "tables/t.lance/_versions").iterdir())) == 1


def test_a_damaged_table_is_not_pushed(hub, kalm, model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(5))
    encode_table(model_dir, corpus, tmp_path / "t.lance")
    (file,) = (tmp_path / "t.lance" / "data").glob("*.lance")
    file.write_bytes(file.read_bytes()[:-100])
    assert "not uploaded" in kalm("push", tmp_path / "t.lance", f"{DATASET}/t.lance", code=2)
    assert list(hub.files.iterdir()) == []


@pytest.mark.parametrize("address", ["hf://models/a/b", "hf://datasets/a/b", "s3://b/t.lance"])
def test_what_is_no_place_on_the_hub_is_named(kalm, small_table, address):
    assert f"{address} names no table" in kalm("push", small_table, address, code=2)


def ranked(output):
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(line)["results"]


def _file(folder, *ids):
    file = folder / "ids.txt"
    file.write_text("\n".join(ids) + "\n")
    return file
