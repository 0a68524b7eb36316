"""Run every scenario, print a table and one summary line; exit 1 if a single row is wrong."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pipeline.run.driver
import pipeline.upkeep.sync
import pipeline.upkeep.truncate
import pipeline.upkeep.verify  # noqa: F401
from tests.faults import scenarios, step_scenarios
from tests.faults.steps import FINISH, PLANNING, STEPS, SYNC, TRUNCATE, VERIFY
from tests.faults.world import HEADER, Tally, World
from tests.support.s3_server import serve


def _encoding(world: World, *, short: bool) -> list[Callable[[], Tally]]:
    """Return the scenarios in which a table is encoded."""
    plan = [
        lambda: scenarios.kills(world, 2 if short else 15, on_s3=False),
        lambda: scenarios.kills(world, 1 if short else 8, on_s3=True),
        lambda: scenarios.split_brain(world, 2 if short else 12),
        lambda: scenarios.store_faults(world, 1 if short else 4),
        lambda: scenarios.sweep(world, 25 if short else 1),
    ]
    if not short:
        plan += [
            lambda: scenarios.ray_kills(world, 3),
            lambda: scenarios.ray_sweep(world),
            lambda: scenarios.lost_node(world),
        ]
    return plan


def _steps(world: World, *, short: bool) -> list[Callable[[], Tally]]:
    """Return the scenarios of the steps that go over all rows of a table."""
    if short:
        return [
            *(partial(step_scenarios.kills, world, step, 1) for step in (TRUNCATE, FINISH)),
            lambda: step_scenarios.at_parts(world, (VERIFY, FINISH, SYNC, PLANNING), 12),
        ]
    return [
        *(partial(step_scenarios.kills, world, step, 2) for step in (*STEPS, PLANNING)),
        lambda: step_scenarios.at_parts(world, (VERIFY, FINISH, SYNC, PLANNING), 3),
        lambda: step_scenarios.sweep(world, TRUNCATE, 20),
        lambda: step_scenarios.sweep(world, VERIFY, 40),
        lambda: step_scenarios.sweep(world, FINISH, 40),
        lambda: step_scenarios.sweep(world, SYNC, 80),
        lambda: step_scenarios.ray_kills(world, (TRUNCATE, FINISH, SYNC)),
        lambda: step_scenarios.no_nodes(world, (TRUNCATE, FINISH)),
    ]


def run(*, short: bool, seed: int, steps_only: bool) -> int:
    """Run the scenarios; return the number of wrong rows."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder, "s3")) as s3:
        world = World(Path(folder), s3, seed)
        plan = [] if steps_only else _encoding(world, short=short)
        plan += _steps(world, short=short)
        print(f"seed {seed}\n{HEADER}", flush=True)
        tallies = []
        for scenario in plan:
            tallies.append(scenario())
            print(tallies[-1].line(), flush=True)
        control = scenarios.control(world, 2 if short else 6)
        print(control.line(), flush=True)
        bad = sum(t.bad for t in tallies)
        if bad:
            print(world.log.read_text(errors="replace")[-5000:])
    faults = sum(t.faults.total() for t in tallies)
    print(
        f"{'FAILED' if bad else 'ok'}: {faults} faults in {sum(t.runs for t in tallies)} runs, "
        f"{sum(t.rows for t in tallies)} rows checked: {sum(t.lost for t in tallies)} lost, "
        f"{sum(t.doubled for t in tallies)} doubled, "
        f"{sum(t.different for t in tallies)} different, "
        f"{sum(t.manual_steps for t in tallies)} manual steps; control: {control.bad} rows wrong; "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    return bad


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="about a minute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", action="store_true", help="only steps over all rows of a table")
    given = parser.parse_args()
    sys.exit(1 if run(short=given.short, seed=given.seed, steps_only=given.steps) else 0)
