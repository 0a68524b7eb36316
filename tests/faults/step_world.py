"""One step in the world: its runs, and how its outcome is compared with that of a sound run."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

import lance

from tests.faults.small_parts import Change, make_small
from tests.faults.steps import Step
from tests.faults.world import MOST_STARTS, ROWS, Tally, World, compare, in_fork

LOOKED_UP = 25
"""Ids that are looked up to compare the answers of the indexes."""


class StepWorld:
    """One step in the world, on a disk or on S3: where each run starts, and what it is to give.

    Attributes:
        expected: Address of the table that a run without faults made.
        seconds: Time that it took.
    """

    def __init__(self, world: World, step: Step, *, on_s3: bool = False) -> None:
        self.world, self.step, self.on_s3 = world, step, on_s3
        self._folder = world.s3.folder / "bucket" if on_s3 else world.folder
        self._start = f"start-{step.name}.lance"
        if step.begins_with:
            step.begins_with(world, self._address(self._start))
        self.expected = self._address(f"unbroken-{step.name}.lance")
        self._copy_start(f"unbroken-{step.name}.lance")
        self.arguments(self.expected)  # makes what the command reads
        began = time.monotonic()
        if not self.run(self.expected):
            raise RuntimeError(f"{step.name} fails without any fault, see {world.log}")
        self.seconds = time.monotonic() - began

    def new_table(self) -> str:
        """Return the address of a table in the state from which the step starts."""
        address = self.world.new_table(on_s3=self.on_s3)
        self._copy_start(address.rpartition("/")[2])
        return address

    def start(self, table: str, change: Change = lambda: None) -> Any:
        """Start the step with small parts, as a fork of this process."""

        def changed() -> None:
            make_small()
            change()

        return self.world.start(self.arguments(table), changed, self.report(table))

    def start_ray(self, table: str, *more: str) -> subprocess.Popen[bytes]:
        """Start the step with small parts on Ray, in a process of its own."""
        arguments = [*self.arguments(table, workers=2), *more]
        return self.world.start_ray(arguments, "tests.faults.small_parts", self.report(table))

    def arguments(self, table: str, workers: int = 0) -> list[str]:
        """Return the arguments of the step."""
        options = self.world.s3.arguments if self.on_s3 else []
        return [*self.step.command(self.world, table), "--workers", str(workers), *options]

    def run(self, table: str, change: Change = lambda: None) -> bool:
        """Run the step without any fault; return whether it went through."""
        process = self.start(table, change)
        process.join()
        return bool(process.exitcode == self.step.ends_with)

    def run_to_the_end(self, tally: Tally, table: str) -> None:
        """Start the step again until it succeeds, as any supervisor would."""
        if not any(self.run(table) for _ in range(MOST_STARTS)):
            tally.manual_steps += 1

    def check(self, tally: Tally, table: str) -> None:
        """Compare the outcome with that of a run without faults; then remove the table."""
        tally.runs += 1
        expected = self.expected
        options = self.world.s3.options if self.on_s3 else None
        if self.step.ends_with:  # verify: its outcome is what it prints
            want, got = (_report(self.report(each)) for each in (expected, table))
            tally.rows += got.get("rows", 0)
            tally.lost += max(0, want["rows"] - got.get("rows", 0))
            tally.different += want != got
        else:
            in_order = self.step.in_order
            found = in_fork(lambda: compare_finished(expected, table, options, in_order))
            tally.rows += found[0]
            tally.lost += found[1]
            tally.doubled += found[2]
            tally.different += found[3]
            tally.repeated_shards += found[4]
        shutil.rmtree(self._folder / table.rpartition("/")[2], ignore_errors=True)
        self.report(table).unlink(missing_ok=True)

    def report(self, table: str) -> Path:
        """Return the file that takes what the step prints."""
        return self.world.folder / f"{table.rpartition('/')[2]}-{self.on_s3}.json"

    def _address(self, name: str) -> str:
        return f"s3://bucket/{name}" if self.on_s3 else str(self._folder / name)

    def _copy_start(self, name: str) -> None:
        if self.step.begins_with:
            shutil.copytree(self._folder / self._start, self._folder / name)


def compare_finished(
    expected: str, table: str, options: dict[str, str] | None, in_order: bool
) -> tuple[int, int, int, int, int]:
    """Return rows compared, lost, doubled, different and orphaned files; indexes are compared."""
    lost, doubled, different, orphans = compare(expected, table, options, in_order=in_order)
    want, got = (
        lance.dataset(uri, version="live", storage_options=options) for uri in (expected, table)
    )
    answers = [_answers(dataset) for dataset in (want, got)]
    different += sum(a != b for a, b in zip(*answers, strict=True))
    return want.count_rows(), lost, doubled, different, orphans


def _answers(dataset: lance.LanceDataset) -> list[Any]:
    """Return what is indexed, the rows that are not, and what look-ups and searches find."""
    indexes = sorted((index.name, tuple(index.field_names)) for index in dataset.describe_indices())
    lacking = [
        dataset.stats.index_stats(name)["num_unindexed_rows"] for name, _ in indexes
    ]  # fmt: skip
    ids = [f"p{row}" for row in range(0, ROWS, ROWS // LOOKED_UP)]
    found = [
        sorted(
            dataset.to_table(columns=["text_hash"], filter=f"id = '{id}'")["text_hash"].to_pylist()
        )
        for id in ids
    ]
    words = [
        sorted(dataset.to_table(columns=["id", "_score"], full_text_query=word)["id"].to_pylist())
        for word in ("index", "query", "shard")
    ]
    return [indexes, lacking, found, words]


def _report(file: Path) -> dict[str, Any]:
    """Return what verify printed last, without the address; {} if that is no report."""
    lines = [line for line in file.read_text().splitlines() if line.startswith("{")]
    report: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    report.pop("uri", None)
    return report


@cache
def step_world(world: World, step: Step, *, on_s3: bool = False) -> StepWorld:
    """Return a step in the world; what it needs is made once."""
    return StepWorld(world, step, on_s3=on_s3)
