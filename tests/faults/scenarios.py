"""The scenarios: each makes one kind of trouble and returns a Tally."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lance
import psutil
import pyarrow as pa
from ray.cluster_utils import Cluster

from pipeline.table.side_files import PROBES
from tests.faults.world import FORK, ROWS, SHARD_SIZE, Tally, World, in_fork, wait

SWEEP_ROWS = 80
SWEPT = rf"^(?!.*{PROBES})"
"""The requests of a sweep: what the check before a job does to its probe table is no part of it."""


def kills(world: World, runs: int, *, on_s3: bool) -> Tally:
    """SIGKILL the job at random moments until it gets through."""
    tally = Tally("kill, S3" if on_s3 else "kill, disk")
    for _ in range(runs):
        table = world.new_table(on_s3=on_s3)
        arguments = world.arguments(table)
        for _ in range(10):
            process = world.start(arguments)
            if wait(world.moment(on_s3=on_s3), process):
                process.kill()
                process.join()
                tally.faults["SIGKILL"] += 1
        world.run_to_the_end(tally, arguments)
        world.check(tally, table)
    return tally


def split_brain(world: World, runs: int) -> Tally:
    """Stop a driver, let a second one take over, then wake the first."""
    tally = Tally("two drivers")
    for _ in range(runs):
        table = world.new_table()
        arguments = world.arguments(table)
        first = world.start(arguments)
        if wait(world.moment(), first):
            os.kill(first.pid, signal.SIGSTOP)
            tally.faults["SIGSTOP, SIGCONT"] += 1
        second = world.start(arguments)
        wait(2 * world.moment(), second)
        with contextlib.suppress(ProcessLookupError):
            os.kill(first.pid, signal.SIGCONT)
        first.join()
        second.join()
        world.run_to_the_end(tally, arguments)
        world.check(tally, table)
    return tally


def store_faults(world: World, runs: int) -> Tally:
    """S3 answers 500 and 503, drops connections, delays, and loses replies after the write."""
    tally = Tally("S3 faults")
    for _ in range(runs):
        table = world.new_table(on_s3=True)
        world.s3.faults(
            {"action": "error503", "match": "^(GET|PUT|HEAD)", "probability": 0.05, "count": 30},
            {"action": "error500", "match": "^PUT", "probability": 0.08, "count": 10},
            {"action": "lost_reply", "match": "^PUT", "probability": 0.2, "count": 20},
            {"action": "drop", "probability": 0.03, "count": 10},
            {"action": "delay", "probability": 0.02, "count": 4},
        )
        world.run_to_the_end(tally, world.arguments(table))
        tally.faults.update(world.s3.stats()["faults"])
        world.s3.faults()
        world.check(tally, table)
    return tally


def sweep(world: World, every: int = 1) -> Tally:
    """Kill the job before and after each single storage request it makes to its table."""
    tally = Tally("kill at each S3 request")
    table = world.new_table(on_s3=True)
    world.s3.faults()
    world.run_to_the_end(tally, world.arguments(table, rows=SWEEP_ROWS))
    requests = sum(re.search(SWEPT, line) is not None for line in world.s3.stats()["requests"])
    world.check(tally, table, rows=SWEEP_ROWS)
    for number in range(0, requests, every):
        for action in ("kill_before", "kill_after"):
            table = world.new_table(on_s3=True)
            world.s3.faults({"action": action, "match": SWEPT, "skip": number})
            process = world.start(world.arguments(table, rows=SWEEP_ROWS))
            process.join()
            tally.faults.update(world.s3.stats()["faults"])
            world.s3.faults()
            world.run_to_the_end(tally, world.arguments(table, rows=SWEEP_ROWS))
            world.check(tally, table, rows=SWEEP_ROWS)
    return tally


def ray_kills(world: World, runs: int) -> Tally:
    """On Ray: SIGKILL workers and drivers at random."""
    tally = Tally("kill on Ray")
    for _ in range(runs):
        table = world.new_table()
        arguments = world.arguments(table, ray=True)
        for attempt in range(20):
            process = world.start_ray(arguments)
            while wait(world.random.uniform(1.0, 6.0), process):
                workers = workers_of(process.pid)
                if attempt < 2 and world.random.random() < 0.3:
                    process.kill()
                    tally.faults["SIGKILL driver"] += 1
                elif workers and attempt < 3 and world.random.random() < 0.5:
                    world.random.choice(workers).kill()
                    tally.faults["SIGKILL worker"] += 1
            if process.wait() == 0:
                break
        else:
            tally.manual_steps += 1
        world.check(tally, table, ray=True)
    return tally


def ray_sweep(world: World) -> Tally:
    """On Ray and S3: kill a process before and after each data file that it writes.

    The workers write one file per shard; the last file is the driver's compaction.
    """
    tally = Tally("kill at each write, Ray, S3")
    for number in range(SWEEP_ROWS // SHARD_SIZE + 1):
        for action in ("kill_before", "kill_after"):
            table = world.new_table(on_s3=True)
            arguments = world.arguments(table, ray=True, rows=SWEEP_ROWS)
            match = r"^PUT .*\.lance/data/"
            world.s3.faults({"action": action, "match": match, "skip": number})
            while world.start_ray(arguments).wait() != 0:
                tally.faults["start again"] += 1
                if tally.faults["start again"] > 40:
                    tally.manual_steps += 1
                    return tally
            tally.faults.update(world.s3.stats()["faults"])
            world.s3.faults()
            world.check(tally, table, ray=True, rows=SWEEP_ROWS)
    del tally.faults["start again"]
    return tally


def lost_node(world: World) -> Tally:
    """Remove one of two nodes of a cluster while it works."""
    tally = Tally("node lost on Ray")
    table = world.new_table()
    cluster, nodes = small_cluster()
    try:
        arguments = [*world.arguments(table, ray=True), "--address", cluster.address]
        process = world.start_ray([*arguments, "--cpus-per-worker", "1"])
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if Path(table, "data").exists() and len(list(Path(table, "data").iterdir())) > 1:
                break
            time.sleep(0.05)
        cluster.remove_node(nodes[0])
        tally.faults["node removed"] += 1
        if process.wait() != 0:
            process = world.start_ray(arguments)
            if process.wait() != 0:
                tally.manual_steps += 1
    finally:
        cluster.shutdown()
    world.check(tally, table, ray=True)
    return tally


def control(world: World, runs: int) -> Tally:
    """Do it the usual way under the same kills: append a shard, then leave a marker file."""
    tally = Tally("control: append, then mark")
    for run in range(runs):
        folder = str(world.folder / f"control{run}")
        for _ in range(9):
            process = FORK.Process(target=_append_and_mark, args=(folder,))
            process.start()
            if wait(world.random.uniform(0.1, 1.2), process):
                process.kill()
                process.join()
                tally.faults["SIGKILL"] += 1
        process = FORK.Process(target=_append_and_mark, args=(folder,))
        process.start()
        process.join()
        ids = in_fork(partial(_control_ids, folder))
        tally.runs += 1
        tally.rows += ROWS
        tally.lost += ROWS - len(set(ids))
        tally.doubled += len(ids) - len(set(ids))
    return tally


def _append_and_mark(folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    table = f"{folder}/t.lance"
    for shard in range(ROWS // SHARD_SIZE):
        marker = Path(folder, f"{shard}.done")
        if marker.exists():
            continue
        rows = pa.table({"id": [f"p{shard * SHARD_SIZE + i}" for i in range(SHARD_SIZE)]})
        lance.write_dataset(rows, table, mode="append" if os.path.exists(table) else "create")
        time.sleep(0.05)  # what lies between the two: a reply to wait for, another process
        marker.touch()
        time.sleep(0.05)
    sys.stdout.flush()
    os._exit(0)


def _control_ids(folder: str) -> list[str]:
    ids: list[str] = lance.dataset(f"{folder}/t.lance").to_table()["id"].to_pylist()
    return ids


def workers_of(pid: int) -> list[psutil.Process]:
    """Return the Ray workers that a driver has started on this machine."""
    found = []
    try:
        for child in psutil.Process(pid).children(recursive=True):
            if any("ray::Worker" in part for part in child.cmdline()):
                found.append(child)
    except psutil.Error:
        return []
    return found


def small_cluster() -> tuple[Cluster, list[Any]]:
    """Start a head without CPUs and two nodes with one; return the cluster and the two."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    return cluster, [cluster.add_node(num_cpus=1) for _ in range(2)]
