"""Every step of a table of millions of rows on this machine: seconds, and memory of each process.

A corpus of JSON lines is planned, encoded by a stand-in for the model, rid of repeated ids,
compacted, indexed, published, verified, truncated and synced, each command in a process of its own
with real Ray workers. The driver may not grow with the rows.

python -m tests.bench.billion --rows 1000000 --rows 10000000       about an hour on two cores
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.bench.data import FOLDER, bar

FILES = 8
REPEATED, CHANGED = 100, 100
"""One row in so many repeats an id; one in so many has another text in the changed corpus."""
WORDS = "the state of a passage is the mean of its tokens and a query reads them later".split()
COMMANDS = ("encode", "verify", "truncate", "sync")
BEFORE = ("encode: start", "encode: planning", "encode: shards")
"""Steps up to encoding, in which the driver keeps the plan: about 1 KB per shard."""
SAMPLE_S = 0.5


@dataclass
class Step:
    """What one step took. Memory is what a process does not share with others, in bytes.

    Attributes:
        name: What the driver announced; a step lasts until the next one is announced.
        seconds: Its duration.
        driver_cpu: CPU seconds of the driver.
        workers_cpu: CPU seconds of all workers.
        driver: Most memory of the driver.
        worker: Most memory of the largest worker; 0 if there was none.
    """

    name: str
    seconds: float = 0.0
    driver_cpu: float = 0.0
    workers_cpu: float = 0.0
    driver: int = 0
    worker: int = 0

    def line(self) -> str:
        """Return one row of the report."""
        return (
            f"{self.name:<36}{self.seconds:>9.1f}{self.driver_cpu:>12.1f}{self.workers_cpu:>13.1f}"
            f"{self.driver / 1e6:>11.0f}{self.worker / 1e6:>11.0f}"
        )


HEADER = (
    f"{'step':<36}{'seconds':>9}{'driver CPU':>12}{'workers CPU':>13}{'driver MB':>11}"
    f"{'worker MB':>11}"
)


class Sample(NamedTuple):
    """The driver and its workers at one moment: unshared bytes and CPU seconds by process id."""

    seconds: float
    processes: dict[int, tuple[int, float]]


def main(rows: Sequence[int] = (1_000_000, 10_000_000), folder: Path = FOLDER) -> list[str]:
    tables = [_measure(count, folder / "billion") for count in sorted(rows)]
    first, last = ({step.name: step for step in steps} for steps in (tables[0], tables[-1]))
    bars = []
    for name in [name for name in first if name in last and name not in BEFORE]:
        growth = last[name].driver / max(1, first[name].driver)
        bars.append(bar(f"driver_flat_{name.replace(' ', '_')}", growth, "<=", 1.2))
    return bars


def _measure(rows: int, folder: Path) -> list[Step]:
    """Run all commands on a corpus of so many rows, print what each step took, and clean up."""
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    for name, changed in (("corpus", False), ("changed", True)):
        write_corpus(folder / name, rows, changed=changed)
    size = sum(file.stat().st_size for file in (folder / "corpus").iterdir())
    print(f"\n{rows:,} rows, {size / 1e6:,.0f} MB, written in {time.monotonic() - began:.0f} s")
    print(HEADER, flush=True)
    steps: list[Step] = []
    for command in COMMANDS:
        for step in _run(command, folder):
            steps.append(step)
            print(step.line(), flush=True)
    used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{used / 1e9:.1f} GB on disk at the end", flush=True)
    shutil.rmtree(folder)
    return steps


def write_corpus(folder: Path, rows: int, *, changed: bool = False) -> None:
    """Write so many rows into FILES files; the same rows each time, or some with another text."""
    folder.mkdir(parents=True)
    rng = random.Random(rows)
    phrases = [" ".join(rng.choices(WORDS, k=5)) for _ in range(997)]
    for number in range(FILES):
        with (folder / f"{number}.jsonl").open("w") as file:
            for row in range(number * rows // FILES, (number + 1) * rows // FILES):
                id = row if row % REPEATED else rng.randrange(rows)
                edit = " now" if changed and row % CHANGED == 1 else ""
                text = f"{phrases[row % 997]} {row}{edit}"
                file.write(f'{{"_id": "p{id:09d}", "text": "{text}"}}\n')


def _run(command: str, folder: Path) -> list[Step]:
    """Run one command and return its steps, with the memory of its processes while each lasted."""
    arguments = [sys.executable, "-m", "tests.bench.billion_part", command, str(folder)]
    log = folder / f"{command}.log"
    began = time.monotonic()
    with log.open("wb") as output:
        driver = psutil.Popen(arguments, stdout=output, stderr=output)
        samples = list(_samples(driver, began))
    ended = time.monotonic() - began
    lines = [line for line in log.read_text(errors="replace").splitlines() if "@step " in line]
    if driver.returncode:
        raise RuntimeError(f"{command} failed: {log.read_text(errors='replace')[-3000:]}")
    marks = [json.loads(line.partition("@step ")[2]) for line in lines]
    starts = [at - began for _, at in marks]
    steps = {name: Step(f"{command}: {name}") for name, _ in marks}
    for (name, _), start, end in zip(marks, starts, [*starts[1:], ended], strict=True):
        steps[name].seconds += end - start
    cpu: dict[int, float] = {}
    for seconds, processes in samples:
        step = steps[marks[max(0, bisect_right(starts, seconds) - 1)][0]]
        for pid, (memory, spent) in processes.items():
            more = spent - cpu.get(pid, 0.0)
            cpu[pid] = spent
            if pid == driver.pid:
                step.driver, step.driver_cpu = max(step.driver, memory), step.driver_cpu + more
            else:
                step.worker, step.workers_cpu = max(step.worker, memory), step.workers_cpu + more
    for (name, _), start in zip(marks, starts, strict=True):
        if not steps[name].driver:  # it was over before the next sample
            later = (sample.processes for sample in samples if sample.seconds >= start)
            steps[name].driver = next((p[driver.pid][0] for p in later if driver.pid in p), 0)
    return list(steps.values())


def _samples(driver: psutil.Popen, began: float) -> Iterator[Sample]:
    """Yield what the driver and its workers have and have spent, until the driver ends."""
    process = psutil.Process(driver.pid)
    while driver.poll() is None:
        found = {}
        with contextlib.suppress(psutil.Error):
            for each in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.Error, IndexError):
                    if each == process or each.cmdline()[0].startswith("ray::Worker"):
                        times = each.cpu_times()
                        spent = times.user + times.system
                        found[each.pid] = int(each.memory_full_info().uss), spent
        yield Sample(time.monotonic() - began, found)
        time.sleep(SAMPLE_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, action="append", help="may be repeated")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where corpus and tables lie")
    given = parser.parse_args()
    print("\n".join(main(given.rows or (1_000_000, 10_000_000), given.folder)))
