"""The threads of a forward: as many as the process may use CPUs, or as its environment says."""

import os
import subprocess
import sys

import pytest

from kalm_encoder.service.cpus import usable_cpus

LIMITED = (
    "import torch; from kalm_encoder.service import cpus; cpus.limit_threads(); "
    "print(torch.get_num_threads())"
)


def threads(**environment):
    others = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", LIMITED]
    return int(subprocess.check_output(command, env={**others, **environment}))


@pytest.mark.parametrize(
    ("quota", "at_most"),
    [("100000 100000", 1), ("50000 100000", 1), ("150000 100000", 1), ("max 100000", None)],
)
def test_a_container_gets_no_more_threads_than_cpu_time(tmp_path, quota, at_most):
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert usable_cpus(file) == (at_most or len(os.sched_getaffinity(0)))


def test_without_a_quota_the_cpus_of_the_process_count(tmp_path):
    assert usable_cpus(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_the_environment_has_the_last_word():
    assert threads(OMP_NUM_THREADS="1") == 1
    assert 1 <= threads() <= len(os.sched_getaffinity(0))
