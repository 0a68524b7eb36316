"""Faults in the steps that go over all rows: each scenario returns a Tally, as in scenarios.py."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.scenarios import SWEPT, small_cluster, workers_of
from tests.faults.small_parts import kill_at
from tests.faults.step_world import step_world
from tests.faults.steps import Step
from tests.faults.world import Tally, World, wait

MOST_KILLS = 4
MOST_STARTS_ON_RAY = 20
AWAY_S = 5.0
"""How long a cluster has no node at all."""


def kills(world: World, step: Step, runs: int) -> Tally:
    """SIGKILL a step at random moments, several times a run, until it gets through."""
    tally = Tally(f"kill, {step.name}")
    of = step_world(world, step)
    for _ in range(runs):
        table = of.new_table()
        for _ in range(MOST_KILLS):
            process = of.start(table)
            if wait(world.random.uniform(0.05, 0.8 * of.seconds), process):
                process.kill()
                process.join()
                tally.faults["SIGKILL"] += 1
        of.run_to_the_end(tally, table)
        of.check(tally, table)
    return tally


def at_parts(world: World, steps: Sequence[Step], every: int = 1) -> Tally:
    """SIGKILL each step when a part of it is done: before its result is recorded, and after."""
    tally = Tally("kill at each part")
    notes = world.folder / "parts.txt"
    for step in steps:
        of = step_world(world, step)
        notes.write_text("")
        of.run(table := of.new_table(), kill_at(notes))
        of.check(tally, table)
        parts = notes.read_text().splitlines()
        for number in range(0, len(parts), every):
            for after in (False, True):
                table = of.new_table()
                process = of.start(table, kill_at(notes, number, after=after))
                process.join()
                tally.faults[parts[number]] += process.exitcode is not None and process.exitcode < 0
                of.run_to_the_end(tally, table)
                of.check(tally, table)
    return tally


def sweep(world: World, step: Step, every: int = 1) -> Tally:
    """On S3: kill a step before and after storage requests that it makes, every so many."""
    tally = Tally(f"kill at S3 request, {step.name}")
    of = step_world(world, step, on_s3=True)
    table = of.new_table()
    world.s3.faults()
    of.run_to_the_end(tally, table)
    requests = sum(re.search(SWEPT, line) is not None for line in world.s3.stats()["requests"])
    of.check(tally, table)
    for number in range(0, requests, every):
        for action in ("kill_before", "kill_after"):
            table = of.new_table()
            world.s3.faults({"action": action, "match": SWEPT, "skip": number})
            process = of.start(table)
            process.join()
            tally.faults.update(world.s3.stats()["faults"])
            world.s3.faults()
            of.run_to_the_end(tally, table)
            of.check(tally, table)
    return tally


def ray_kills(world: World, steps: Sequence[Step]) -> Tally:
    """On Ray: SIGKILL two workers and the driver of each step, once it has workers."""
    tally = Tally("kill on Ray, steps")
    for step in steps:
        of = step_world(world, step)
        table = of.new_table()
        victims = world.random.sample(["worker", "worker", "driver"], 3)
        for _ in range(MOST_STARTS_ON_RAY):
            process = of.start_ray(table)
            while wait(world.random.uniform(0.2, 1.5), process):
                workers = workers_of(process.pid)
                if workers and victims:
                    victim = victims.pop()
                    (process if victim == "driver" else world.random.choice(workers)).kill()
                    tally.faults[f"SIGKILL {victim}"] += 1
            if process.wait() == step.ends_with:
                break
        else:
            tally.manual_steps += 1
        of.check(tally, table)
    return tally


def no_nodes(world: World, steps: Sequence[Step]) -> Tally:
    """Take all nodes of a cluster away while a step runs, and bring one back after a while."""
    tally = Tally("no node left, then one")
    cluster, nodes = small_cluster()
    try:
        for step in steps:
            of = step_world(world, step)
            table = of.new_table()
            before = _written(table)
            process = of.start_ray(table, "--address", cluster.address)
            while process.poll() is None and _written(table) == before:
                time.sleep(0.02)
            if process.poll() is None:
                for node in nodes:
                    cluster.remove_node(node)
                tally.faults["all nodes removed"] += 1
                time.sleep(AWAY_S)
                nodes = [cluster.add_node(num_cpus=2)]
            if process.wait() != step.ends_with:
                of.run_to_the_end(tally, table)
            of.check(tally, table)
    finally:
        cluster.shutdown()
    return tally


def _written(table: str) -> int:
    """Return the number of files that workers write: data, and the results of parts."""
    folder = Path(table)
    return sum(1 for kind in ("data/*", "_kalm/steps/**/*") for _ in folder.glob(kind))
