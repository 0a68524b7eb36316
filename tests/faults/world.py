"""The corpus, the model and the tables of all scenarios, and the comparison with a sound run."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lance

from jobs import cli
from tests.conftest import make_texts, write_corpus
from tests.support.random_model import make_checkpoint
from tests.support.s3_server import S3

FORK = multiprocessing.get_context("fork")
"""Jobs without Ray are forks of this process, which itself never calls torch or Lance."""
ROWS, SHARD_SIZE = 800, 20
MOST_STARTS = 200


@dataclass
class Tally:
    """What one scenario did and found."""

    name: str
    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    lost: int = 0
    doubled: int = 0
    different: int = 0
    repeated_shards: int = 0
    manual_steps: int = 0

    @property
    def bad(self) -> int:
        """Number of wrong rows, and of steps that a person had to take."""
        return self.lost + self.doubled + self.different + self.manual_steps

    def line(self) -> str:
        """Return one row of the report."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.faults.items()))
        return (
            f"{self.name:<28}{self.runs:>5}{self.faults.total():>8}{self.rows:>9}{self.lost:>6}"
            f"{self.doubled:>9}{self.different:>11}{self.repeated_shards:>10}  {kinds}"
        )


HEADER = (
    f"{'scenario':<28}{'runs':>5}{'faults':>8}{'rows':>9}{'lost':>6}{'doubled':>9}"
    f"{'different':>11}{'repeated':>10}  faults by kind"
)


class World:
    """Where the scenarios happen."""

    def __init__(self, folder: Path, s3: S3, seed: int) -> None:
        self.folder, self.s3 = folder, s3
        self.random = random.Random(seed)
        self.log = folder / "log.txt"
        texts = make_texts(ROWS, seed=7)
        self.corpus = write_corpus(folder / "corpus.jsonl", texts)
        write_corpus(s3.folder / "bucket" / "corpus.jsonl", texts)
        self.model = folder / "model"
        in_fork(lambda: make_checkpoint(self.model, make_texts(300)) and None)
        self._tables = 0
        self._durations = {on_s3: self._measure(on_s3) for on_s3 in (False, True)}

    def moment(self, *, on_s3: bool = False) -> float:
        """Return a random moment in the life of a job, in seconds from its start."""
        return 0.1 + self.random.uniform(0, 0.4 * self._durations[on_s3])

    def _measure(self, on_s3: bool) -> float:
        began = time.monotonic()
        self.start(self.arguments(self.new_table(on_s3=on_s3))).join()
        return time.monotonic() - began

    def new_table(self, *, on_s3: bool = False) -> str:
        """Return the address of a table that is not there yet."""
        self._tables += 1
        name = f"t{self._tables}.lance"
        return f"s3://bucket/{name}" if on_s3 else str(self.folder / name)

    def arguments(self, table: str, *, ray: bool = False, rows: int = ROWS) -> list[str]:
        """Return the command line of the job that fills a table."""
        on_s3 = table.startswith("s3://")
        corpus = "s3://bucket/corpus.jsonl" if on_s3 else str(self.corpus)
        return [
            "encode", corpus, "--to", table, "--model", str(self.model), "--shard-size",
            str(SHARD_SIZE), "--limit", str(rows), "--commit-every", "0",
            *([] if ray else ["--workers", "0"]),
            *(self.s3.arguments if on_s3 else []),
        ]  # fmt: skip

    def start(
        self,
        arguments: list[str],
        change: Callable[[], None] = lambda: None,
        output: Path | None = None,
    ) -> Any:
        """Start a job as a fork of this process.

        Args:
            arguments: Its command line.
            change: What it does first, such as to change a constant of a module.
            output: File for what it prints; None is the log.
        """
        process = FORK.Process(
            target=_job, args=(arguments, str(self.log), change, str(output or self.log))
        )
        process.start()
        return process

    def start_ray(
        self, arguments: list[str], module: str = "jobs", output: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a job on Ray, as a user does.

        Args:
            arguments: Its command line.
            module: Module that runs it.
            output: File for what it prints; None is the log.
        """
        log, printed = self.log.open("ab"), (output or self.log).open("ab")
        return subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdout=printed, stderr=log
        )

    def run_to_the_end(self, tally: Tally, arguments: list[str]) -> None:
        """Start the same job again until it succeeds, as any supervisor would."""
        for _ in range(MOST_STARTS):
            process = self.start(arguments)
            process.join()
            if process.exitcode == 0:
                return
        tally.manual_steps += 1

    def check(self, tally: Tally, table: str, *, ray: bool = False, rows: int = ROWS) -> None:
        """Compare a finished table with that of a run without faults; then remove it."""
        expected = self.folder / f"unbroken-{ray}-{rows}.lance"
        if not expected.exists():
            arguments = self.arguments(str(expected), ray=ray, rows=rows)
            process = self.start_ray(arguments) if ray else self.start(arguments)
            process.wait() if ray else process.join()
        options = self.s3.options if table.startswith("s3://") else None
        lost, doubled, different, orphans = in_fork(lambda: compare(str(expected), table, options))
        tally.runs += 1
        tally.rows += rows
        tally.lost += lost
        tally.doubled += doubled
        tally.different += different
        tally.repeated_shards += orphans
        name = table.rsplit("/", 1)[-1]
        for place in (self.folder / name, self.s3.folder / "bucket" / name):
            shutil.rmtree(place, ignore_errors=True)


def compare(
    expected: str, table: str, options: dict[str, str] | None, *, in_order: bool = True
) -> tuple[int, int, int, int]:
    """Return rows lost, doubled, different (content or order), and data files nobody names.

    Args:
        expected: Address of the table of a run without faults.
        table: Address of the table to compare.
        options: Storage options of the tables that are on S3.
        in_order: Whether another order of the rows is a difference.
    """
    on_s3 = options if "://" in expected else None
    want = lance.dataset(expected, version="live", storage_options=on_s3).to_table()
    dataset = lance.dataset(table, storage_options=options)
    live = "live" in dataset.tags.list()
    got = dataset.checkout_version("live").to_table() if live else want.slice(0, 0)
    if not in_order:
        want, got = want.sort_by("id"), got.sort_by("id")
    ids, wanted = got["id"].to_pylist(), want["id"].to_pylist()
    lost, doubled = len(set(wanted) - set(ids)), len(ids) - len(set(ids))
    different = 0
    if not lost and not doubled and not got.equals(want):
        pairs = zip(got.to_pylist(), want.to_pylist(), strict=True)
        different = sum(a != b for a, b in pairs)
    tracked = set(dataset.tracked_files().read_all()["path"].to_pylist())
    every = set(dataset.all_files().read_all()["path"].to_pylist())
    orphans = [f for f in every - tracked if "data/" in f and "_kalm" not in f]
    return lost, doubled, different, len(orphans)


def in_fork(action: Callable[[], Any]) -> Any:
    """Run something in a fork, so that this process stays fit to fork, and return its result."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: sender.send(action()))
    process.start()
    while not receiver.poll(0.05):
        if not process.is_alive() and not receiver.poll():
            raise RuntimeError(f"a fork ended with {process.exitcode}")
    result = receiver.recv()
    process.join()
    return result


def _job(arguments: list[str], log: str, change: Callable[[], None], output: str) -> None:
    with open(log, "ab") as file, open(output, "ab") as printed:
        os.dup2(printed.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.setpgid(0, 0)
    sys.argv = ["kalm", *arguments]
    change()
    cli.main()
    sys.stdout.flush()
    os._exit(0)


def wait(seconds: float, process: Any) -> bool:
    """Wait until a time is over or a process ends, and return whether the process still runs."""
    process.join(seconds) if hasattr(process, "join") else _wait(process, seconds)
    return bool(process.is_alive() if hasattr(process, "is_alive") else process.poll() is None)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    until = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
