"""Finds out how many CPUs this process may use, which torch does not know in a container."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""File of Linux (cgroup v2) with the microseconds of CPU time per period: `200000 100000` or `max
100000`."""


def usable_cpus(quota_file: Path = CGROUP_QUOTA) -> int:
    """Return the CPUs that this process may run on, and no more than its container's share."""
    cpus = len(os.sched_getaffinity(0))
    if quota_file.exists():
        quota, period = quota_file.read_text().split()
        if quota != "max":
            cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus)


def limit_threads() -> None:
    """Let a forward use no more threads than there are usable CPUs, unless OMP_NUM_THREADS is set.

    The threads of a forward wait for each other: one that gets no CPU holds up all others.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))
    logger.info("a forward on the CPU uses %d threads", torch.get_num_threads())
