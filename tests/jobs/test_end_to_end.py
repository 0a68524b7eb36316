"""The commands as a user runs them, killed as machines kill them."""

import json
import signal
import subprocess
import sys
import time

import lance
import psutil
import pytest

from kalm_encoder import PassageTable
from tests.conftest import make_texts, write_corpus
from tests.support.commands import HANG_S, kalm

PASSAGES, SHARD_SIZE = 2400, 80
ON_RAY = ("--cpus-per-worker", 1, "--commit-every", 0)
"""A worker a CPU: several workers, each with shards of its own."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return write_corpus(folder / "corpus.jsonl", make_texts(PASSAGES, seed=42))


def encode_arguments(corpus, table, model_dir, *more):
    options = ["--model", model_dir, "--shard-size", SHARD_SIZE, *more]
    return ["encode", corpus, "--to", table, *options]


@pytest.fixture(scope="module")
def unbroken(corpus, model_dir, tmp_path_factory):
    """The table of a run that nothing disturbed, in one process without Ray, as Arrow."""
    table = tmp_path_factory.mktemp("unbroken") / "t.lance"
    kalm(*encode_arguments(corpus, table, model_dir, "--workers", 0), check=0)
    rows = lance.dataset(str(table)).to_table()
    assert rows.num_rows == PASSAGES
    return rows


def start(arguments):
    """Start `kalm` as a user does, by an interpreter of its own."""
    command = [sys.executable, "-m", "jobs", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_shards(table, count, process):
    """Wait until so many shards are committed."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if (table / "_versions").exists():
            done = len(lance.dataset(str(table)).get_fragments())
            if done >= count:
                return done
        time.sleep(0.02)
    raise AssertionError(f"never {count} shards")


def workers_of(process) -> list[psutil.Process]:
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("ray::Worker" in part for part in child.cmdline())
    ]


def assert_equal_to(table, unbroken):
    """Same ids, same states bit for bit, nothing twice, in the same order."""
    rows = lance.dataset(str(table), version="live").to_table()
    assert rows.num_rows == PASSAGES
    assert len(set(rows["id"].to_pylist())) == PASSAGES
    assert rows.equals(unbroken)


def test_a_killed_driver_is_resumed_to_the_same_table_and_a_killed_worker_costs_nothing(
    corpus, model_dir, tmp_path, unbroken
):
    table = tmp_path / "t.lance"
    arguments = encode_arguments(corpus, table, model_dir, *ON_RAY)
    process = start(arguments)
    done = wait_for_shards(table, 3, process)
    orphans = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert done < PASSAGES // SHARD_SIZE, "killed too late to prove anything"
    assert kalm("rerank", table, "--query", "q", "--ids", "p1").returncode == 2  # not complete
    _, alive = psutil.wait_procs(orphans, timeout=HANG_S)
    assert orphans and not alive, "workers outlive their driver"
    again = start(arguments)
    wait_for_shards(table, done + 3, again)
    victim, *_ = workers_of(again)
    victim.send_signal(signal.SIGKILL)
    stdout, stderr = again.communicate(timeout=HANG_S)
    assert again.returncode == 0, stdout + stderr
    assert "a worker died" in stderr
    encoded = int(stdout.split("encoded ")[1].split()[0])
    assert 0 < encoded < PASSAGES // SHARD_SIZE
    assert_equal_to(table, unbroken)
    assert "already complete" in kalm(*arguments, check=0).stdout


def test_sigterm_commits_what_is_there(corpus, model_dir, tmp_path, unbroken):
    table = tmp_path / "t.lance"
    arguments = encode_arguments(corpus, table, model_dir, "--workers", 0, "--commit-every", 0)
    process = start(arguments)
    wait_for_shards(table, 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == 143, stderr
    assert "run again to resume" in stderr
    kalm(*arguments, check=0)
    rows = lance.dataset(str(table), version="live").to_table(columns=["id", "num_tokens"])
    assert rows.equals(unbroken.select(["id", "num_tokens"]))


@pytest.fixture(scope="module")
def table(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    corpus = write_corpus(folder / "c.jsonl", make_texts(40))
    arguments = encode_arguments(corpus, folder / "t.lance", model_dir, "--workers", 0)
    kalm(*arguments, "--ratios", "4,32", check=0)
    return folder / "t.lance"


def test_status_reports_the_table(table, model_dir):
    facts = json.loads(kalm("status", table, "--json", check=0).stdout)
    assert facts["state"] == "complete"
    assert facts["model"] == str(model_dir)
    assert facts["ratios"] == "4,32"
    assert (facts["passages"], facts["shards"], facts["shards_missing"]) == (40, 1, 0)
    assert facts["floor_bytes_per_token"] == 128 * 2 / 4 + 128 * 2 / 32
    assert facts["bytes_per_token"] > facts["floor_bytes_per_token"]
    assert "fingerprint" in kalm("status", table, check=0).stdout


def test_rerank_from_ids_files_and_search(table, tmp_path):
    listed = kalm("rerank", table, "--query", "token", "--ids", "p1,p2,p3", "--json", check=0)
    results = json.loads(listed.stdout)["results"]
    assert {r["id"] for r in results} == {"p1", "p2", "p3"}
    assert [r["score"] for r in results] == sorted((r["score"] for r in results), reverse=True)
    file = tmp_path / "ids.txt"
    file.write_text("p1\np2\np3\n")
    from_file = kalm("rerank", table, "--query", "token", "--ids-file", file, "--json", check=0)
    assert json.loads(from_file.stdout)["results"] == results
    found = kalm("rerank", table, "--query", "token", "--search", 7, "--top-k", 3, check=0)
    assert "7 candidates" in found.stdout
    coarse = ["rerank", table, "--query", "token", "--ids", "p1", "--ratio", 64, "--json"]
    assert json.loads(kalm(*coarse, check=0).stdout)["results"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--ratios", "8"], "ratios"),
        (["--ratios", "4,32", "--max-length", "100"], "max_length"),
        (["--ratios", "4,32", "--store-dtype", "float32"], "store_dtype"),
        (["--ratios", "4,32", "--no-text"], "keep_text"),
        (["--ratios", "4,32", "--limit", "10"], "other input"),
    ],
)
def test_other_settings_on_a_table_are_refused_by_name(table, model_dir, change, field):
    arguments = encode_arguments(table.parent / "c.jsonl", table, model_dir, "--workers", 0)
    done = kalm(*arguments, *change, check=2)
    assert field in done.stderr
    assert done.stderr.count("\n") <= 3  # how the corpus is read, its kept plan, and the error
    assert "Traceback" not in done.stderr


def test_rejected_rows_are_kept_where_a_user_can_read_them(model_dir, tmp_path):
    corpus = tmp_path / "c.jsonl"
    good = [json.dumps({"id": f"p{i}", "text": t}) for i, t in enumerate(make_texts(30))]
    corpus.write_text("\n".join([*good[:15], '{"id": "bad", "text": null}', *good[15:]]))
    table = tmp_path / "t.lance"
    arguments = encode_arguments(corpus, table, model_dir, "--workers", 0)
    refused = kalm(*arguments, check=1)
    assert "1 rows were rejected, 0 of 31 may be" in refused.stderr
    assert "line 16: field 'text' holds no text" in refused.stderr
    done = kalm(*arguments, "--max-rejected", 0.1, check=0)
    assert "1 rows rejected" in done.stdout
    (file,) = (table / "_kalm" / "rejects").iterdir()
    reject = json.loads(file.read_text())
    assert (reject["id"], reject["line"], reject["path"]) == ("bad", 16, str(corpus))
    assert len(PassageTable.open(str(table))) == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "none.jsonl", "--to", "t.lance", "--model", "M"], "no file matches none.jsonl"),
        (["encode", "c.jsonl", "--to", "t", "--model", "M"], "must end in .lance"),
        (["encode", "c.jsonl", "--to", "t.lance", "--model", "none/x"], "'none/x'"),
        (["encode", "c.jsonl", "--to", "t.lance", "--model", "M", "--ratio", "0"], "ratios [0]"),
        (["encode", "c.jsonl", "--to", "t.lance", "--model", "M", "--ratios", "a"], "'a'"),
        (["rerank", "none.lance", "--query", "q", "--ids", "a"], "/none.lance: "),
        (
            ["encode", "c.jsonl", "--to", "t.lance", "--model", "M", "--max-length", "2"],
            "max_length 2",
        ),
        (["rerank", "none.lance", "--query", "q"], "one of --ids"),
        (["status", "none.lance"], "/none.lance: "),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(model_dir, tmp_path, arguments, message):
    write_corpus(tmp_path / "c.jsonl", ["a"])
    arguments = [str(model_dir) if a == "M" else a for a in arguments]
    more = ["--workers", "0"] if arguments[0] == "encode" else []
    done = kalm(*arguments, *more, cwd=tmp_path, check=2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "t.lance").exists(), "bad input left a table behind"


@pytest.mark.slow
def test_the_demo_ranks_offline_and_says_what_it_is(tmp_path):
    done = kalm("demo", "--folder", tmp_path / "demo", "--workers", 0, check=0)
    assert "a demo checkpoint: 3.5 million parameters" in done.stdout
    best = [answer.splitlines()[2] for answer in done.stdout.split("\n\n")[1:4]]
    for line, name in zip(
        best, ("list.sort", "datetime.date.isoweekday", "shutil.copystat"), strict=True
    ):
        assert name in line
    facts = json.loads(kalm("status", tmp_path / "demo/passages.lance", "--json").stdout)
    assert facts["state"] == "complete"
    assert facts["passages"] > 1000


def test_debug_shows_the_traceback():
    assert "Traceback" in kalm("--debug", "status", "none.lance").stderr
