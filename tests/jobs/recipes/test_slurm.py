"""slurm.sh with stand-ins for `srun` and `scontrol`, real Ray nodes and real signals."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import lance
import pytest

from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.commands import HANG_S
from tests.support.raylets import own_environment
from tests.support.serving import wait_until

RECIPE = Path(__file__).parents[3] / "jobs" / "recipes" / "slurm.sh"
SHARDS, SHARD_SIZE, NODES = 80, 40, 2
# Tasks on further nodes, all on this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((node = 1; node < SLURM_JOB_NUM_NODES; node++)); do SLURMD_NODENAME=node$node "$@" & done
wait
"""
SCONTROL = '#!/bin/sh\necho "$*" >> "$REQUESTS"\n'

pytestmark = pytest.mark.slow


@pytest.fixture
def allocation(tmp_path):
    """The environment of a job on two nodes with one CPU each."""
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, script in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stand_ins / name).write_text(script)
        (stand_ins / name).chmod(0o755)
    job = str(os.getpid())
    yield {
        "PATH": f"{stand_ins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(RECIPE.parents[2]),
        "REQUESTS": str(tmp_path / "requests"),
        "SLURMD_NODENAME": "node0",
        "SLURM_JOB_ID": job,
        "SLURM_JOB_NUM_NODES": str(NODES),
        "SLURM_CPUS_PER_TASK": "1",
    }
    for node in range(NODES):
        shutil.rmtree(f"/tmp/ray-{job}-node{node}", ignore_errors=True)


@contextlib.contextmanager
def batch(allocation, arguments, log):
    """Run the script as a batch job; what it started ends with it, as Slurm sees to."""
    with own_environment() as environment, log.open("w") as output:
        yield subprocess.Popen(
            [RECIPE, *map(str, arguments)],
            env={**environment, **allocation},
            stdout=output,
            stderr=output,
            cwd="/",
        )


def test_a_job_is_requeued_before_its_time_is_up_and_then_completes(
    allocation, model_dir, tmp_path
):
    corpus = write_corpus(tmp_path / "corpus.jsonl", make_texts(SHARDS * SHARD_SIZE, seed=6))
    table, requests = tmp_path / "t.lance", tmp_path / "requests"
    options = ["--shard-size", SHARD_SIZE, "--commit-every", 0, "--cpus-per-worker", 1]
    arguments = [corpus, "--to", table, "--model", model_dir, *options]

    log = tmp_path / "first.log"
    with batch(allocation, arguments, log) as script:

        def under_way():
            assert script.poll() is None, log.read_text()
            nodes = log.read_text().count("Ray runtime started")
            return nodes == NODES and committed(table) >= 3 * SHARD_SIZE

        wait_until(under_way)
        script.send_signal(signal.SIGUSR1)
        assert script.wait(HANG_S) == 0, log.read_text()
    assert "run again to resume" in log.read_text()
    assert requests.read_text() == f"requeue {allocation['SLURM_JOB_ID']}\n"
    assert committed(table) < SHARDS * SHARD_SIZE

    log = tmp_path / "again.log"
    with batch(allocation, arguments, log) as script:
        assert script.wait(HANG_S) == 0, log.read_text()
    assert len(requests.read_text().splitlines()) == 1
    undisturbed = tmp_path / "inline.lance"
    encode_table(model_dir, corpus, undisturbed, shard_size=SHARD_SIZE)
    assert lance.dataset(str(table)).to_table() == lance.dataset(str(undisturbed)).to_table()


def test_a_job_whose_ray_cannot_start_fails(allocation, tmp_path):
    log = tmp_path / "log"
    broken = {**allocation, "SLURM_CPUS_PER_TASK": "many"}
    with batch(broken, ["corpus.jsonl", "--to", "t.lance", "--model", "m"], log) as script:
        assert script.wait(HANG_S) == 1, log.read_text()
    assert "'many' is not a valid integer" in log.read_text()


def committed(table):
    """Return the rows committed so far."""
    there = (table / "_versions").exists()
    return lance.dataset(str(table)).count_rows() if there else 0
