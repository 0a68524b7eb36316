"""ray-job.sh on a real cluster of two raylets: `ray job submit`, `ray job stop`, again."""

import json
import re
import subprocess
import time
from pathlib import Path

import lance
import pytest

from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.commands import HANG_S
from tests.support.raylets import raylets
from tests.support.serving import wait_until

RECIPE = Path(__file__).parents[3] / "jobs" / "recipes" / "ray-job.sh"
SHARDS, SHARD_SIZE = 80, 40

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with raylets(2, tmp_path_factory.mktemp("raylets")) as cluster:
        yield cluster


def test_a_submitted_job_uses_every_node_and_survives_a_stop(cluster, model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "corpus.jsonl", make_texts(SHARDS * SHARD_SIZE, seed=6))
    table = tmp_path / "submitted.lance"
    first, log = submit(cluster, corpus, table, model_dir, tmp_path / "first.log")
    nodes = {node["node_id"] for node in cluster.listed("nodes")}
    assert len(nodes) == 2
    wait_until(lambda: encoding_nodes(cluster, first, log) == nodes)
    stop = ["ray", "job", "stop", re.search(r"raysubmit_\w+", log.read_text())[0]]
    subprocess.run(stop, env=cluster.environment, check=True, timeout=HANG_S)
    first.wait(HANG_S)
    assert 0 < lance.dataset(str(table)).count_rows() < SHARDS * SHARD_SIZE

    again, log = submit(cluster, corpus, table, model_dir, tmp_path / "again.log")
    assert again.wait(HANG_S) == 0, log.read_text()
    undisturbed = tmp_path / "inline.lance"
    encode_table(model_dir, corpus, undisturbed, shard_size=SHARD_SIZE)
    assert lance.dataset(str(table)).to_table() == lance.dataset(str(undisturbed)).to_table()
    nodes_of = {actor["pid"]: actor["node_id"] for actor in cluster.listed("actors")}
    assert {nodes_of[worker] for worker in workers_of(table)} == nodes


def submit(cluster, corpus, table, model_dir, log):
    """Start the recipe; return it and the file it prints to."""
    options = ["--shard-size", SHARD_SIZE, "--commit-every", 0, "--cpus-per-worker", 1]
    arguments = [corpus, "--to", table, "--model", model_dir, *options]
    with log.open("w") as output:
        command = [RECIPE, *map(str, arguments)]
        process = subprocess.Popen(
            command, env=cluster.environment, stdout=output, stderr=output, cwd="/"
        )
    return process, log


def encoding_nodes(cluster, process, log):
    """Return the nodes on which a shard has been encoded."""
    assert process.poll() is None, log.read_text()
    time.sleep(1)
    tasks = cluster.listed("tasks")
    return {t["node_id"] for t in tasks if t["name"].endswith(".do") and t["state"] == "FINISHED"}


def workers_of(table):
    """Return the processes that encoded its shards."""
    files = (table / "_kalm" / "runs").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {int(line["worker"].rpartition(":")[2]) for line in lines if "worker" in line}
