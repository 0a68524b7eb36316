"""The threads of a forward: as many as the process may use CPUs, or as its environment says."""

import os

import pytest
import torch

from kalm_encoder.service.cpus import limit_threads, usable_cpus


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


def test_the_environment_has_the_last_word(monkeypatch):
    cpus = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(cpus + 1)
        monkeypatch.setenv("OMP_NUM_THREADS", str(cpus + 1))
        limit_threads()
        assert torch.get_num_threads() == cpus + 1
        monkeypatch.delenv("OMP_NUM_THREADS")
        limit_threads()
        assert 1 <= torch.get_num_threads() <= cpus
    finally:
        torch.set_num_threads(before)
