"""What the driver costs as the number of shards grows; only the encoder's forward is faked.

Every shard is read from a file and becomes a real Lance fragment of one tiny row, in this process.
A job is interrupted when 99 % of it is done and resumed in a new process. The default is 1,000 and
10,000 shards; `python -m tests.bench.scale --shards 100000` adds the long run of about 10 minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import lance
import numpy as np
import psutil

from kalm_encoder.matryoshka import PackedStates, PassageStates
from kalm_encoder.table.rows import build_rows
from pipeline.corpus.shards import Shard, ShardReader
from pipeline.messages import Outcome, ShardResult, Work
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.table.fragments import write_fragment
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.local import in_process
from tests.bench.data import FOLDER, bar

CURVE = (1_000, 10_000)
FILES = 100


def main(curve: Sequence[int] = CURVE) -> list[str]:
    points = [_point(shards) for shards in sorted(curve)]
    first, last = points[0], points[-1]
    return [
        bar("scale_driver_ms", last["driver_ms"], "<=", 3),
        bar("scale_memory_mb", last["memory_mb"], "<=", 300),
        bar("scale_resume_s", last["resume_s"], "<=", 30),
        bar("scale_flat", last["driver_ms"] / first["driver_ms"], "<=", 2),
    ]


def _point(shards: int) -> dict[str, float]:
    """Encode a job of so many shards, interrupted at 99 %, each part in a process of its own."""
    folder = FOLDER / "scale"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for i in range(FILES):
        lines = (
            json.dumps({"_id": f"p{i}-{n}", "text": "a tiny row"}) for n in range(shards // FILES)
        )
        (folder / f"{i:03d}.jsonl").write_text("\n".join(lines) + "\n")
    load = _in_process(folder, shards * 99 // 100)
    again = _in_process(folder, shards)
    print(
        f"{shards} shards: driver {load['driver_ms']:.3f} ms a shard, at most "
        f"{load['longest_s']:.1f} s at once; memory +{load['memory_mb']:.0f} MB; "
        f"{load['commits']:.0f} commits, {load['manifest_mb']:.0f} MB of manifests; first encode "
        f"after {load['first_s']:.1f} s; at 99 % resumed in {again['first_s']:.1f} s, memory "
        f"+{again['memory_mb']:.0f} MB; finished (duplicates, seal, compaction, indexes) in "
        f"{again['finish_s']:.1f} s, memory +{again['finish_mb']:.0f} MB",
        flush=True,
    )
    shutil.rmtree(folder)
    memory = max(load["memory_mb"], again["memory_mb"])
    return {"driver_ms": load["driver_ms"], "memory_mb": memory, "resume_s": again["first_s"]}


def _in_process(folder: Path, stop_at: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.scale", "--part", str(folder), str(stop_at)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


class _Fake:
    """The executor: reads and writes shards, counts what the driver does between two of them."""

    def __init__(self, stop_at: int) -> None:
        self._stop_at = stop_at
        self.first = 0.0
        self.driver_s = self.longest_s = 0.0
        self.given = 0
        self.memory = _Memory()

    def __call__(self, work: Work, shards: Sequence[Shard]) -> Generator[Outcome]:
        if not isinstance(work, EncodeWork):
            yield from in_process(work, shards)
            return
        self.first = time.perf_counter()
        dataset = lance.dataset(work.table.uri, version=1)  # empty: a worker's is not the driver's
        reader = ShardReader()
        for shard in shards:
            if shard.number == self._stop_at:
                self._ended()
                raise KeyboardInterrupt
            passages = reader.read(shard).passages
            state = PassageStates(np.zeros((1, work.spec.dim), np.float32), 4, False)
            states = PackedStates.of([state])
            rows = build_rows(
                work.spec, [p.id for p in passages], [p.text for p in passages], states, shard.id
            )
            seconds = dict.fromkeys(("read", "tokenise", "idle", "forward", "pool", "write"), 0.001)
            result = ShardResult(
                shard, write_fragment(rows, dataset), 1, (), 4, 4, 0, seconds, "host:1"
            )
            began = time.perf_counter()
            yield result
            spent = time.perf_counter() - began
            self.given += 1
            self.driver_s += spent
            self.longest_s = max(self.longest_s, spent)
        self._ended()

    def _ended(self) -> None:
        self.ended = time.perf_counter()
        self.load_mb = self.memory.growth_mb


class _Memory(threading.Thread):
    """Resident memory of this process, looked at ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process()
        self._before = self._peak = self._process.memory_info().rss
        self.start()

    def run(self) -> None:
        while True:
            self._peak = max(self._peak, self._process.memory_info().rss)
            time.sleep(0.1)

    @property
    def growth_mb(self) -> float:
        return (self._peak - self._before) / 1e6


def _part(folder: Path, stop_at: int) -> dict[str, float]:
    """Run or resume the job of a folder until a shard is reached; return what it cost."""
    warm = folder / "warm" / "w.jsonl"
    warm.parent.mkdir(exist_ok=True)
    warm.write_text('{"_id": "w", "text": "a tiny row"}\n')
    warm_table = folder / "warm" / "w.lance"
    shutil.rmtree(warm_table, ignore_errors=True)
    run(_job(str(warm), warm_table), _Fake(1))  # imports and the tokenizer are not the driver's
    table = folder / "scale.lance"
    fake = _Fake(stop_at)
    interrupted = False
    began = time.perf_counter()
    try:
        run(_job(f"{folder}/*.jsonl", table), fake)
    except KeyboardInterrupt:
        interrupted = True
    end = time.perf_counter()
    manifests = list((table / "_versions").glob("*.manifest"))
    return {
        "first_s": fake.first - began,
        # What follows an interruption is the last commit.
        "driver_ms": 1000 * (fake.driver_s + interrupted * (end - fake.ended)) / fake.given,
        "longest_s": fake.longest_s,
        "memory_mb": fake.load_mb,
        "commits": len(manifests),
        "manifest_mb": sum(m.stat().st_size for m in manifests) / 1e6,
        "finish_s": end - fake.ended,
        "finish_mb": fake.memory.growth_mb,
    }


def _job(inputs: str, table: Path) -> EncodeJob:
    return EncodeJob(inputs=(inputs,), uri=str(table), model="kalm-demo", shard_size=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, action="append", help="also so many shards")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        print(json.dumps(_part(Path(options.part[0]), int(options.part[1]))))
    else:
        print("\n".join(main((*CURVE, *(options.shards or ())))))
