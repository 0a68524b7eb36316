"""How many tokens per second the host side of one worker can feed: the real pipeline, no device.

The device is replaced by a queue that takes tokens / SPEED seconds per batch and returns random
states, as a GPU would: behind the host's back, one batch after the other. Reading, tokenising,
packing, taking results, building rows and writing are the real code. Its CPU time is compared with
that of tokenising alone, in turns in one process.

    python -m tests.bench.gpu_check.host_ceiling SPEED SHARDS_IN_FLIGHT [--model DIR]

A SPEED of 1e9 tokens/s means no device at all. Give it two cores, as a worker has beside its GPU.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from jobs.demo import standard_library_docs
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model import checkpoint
from kalm_encoder.model import encoder as encoder_module
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens
from pipeline.corpus.shards import Shard, ShardReader
from pipeline.messages import Outcome, ShardResult, Unit, Work
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.workers import device_threads, shard_encoder
from pipeline.workers.encode_work import EncodeWork
from pipeline.workers.local import in_process
from pipeline.workers.shard_encoder import ShardEncoder
from tests.bench.data import bar, spread, write_corpus
from tests.bench.forwards import RATIO, ms_marco_lengths
from tests.support.random_model import TINY, make_checkpoint

SHARD_SIZE = 1_000
ROUNDS = 5
GPU_TOKEN_BUDGET = 65_536
WIDE = replace(TINY, hidden=640, intermediate=64, layers=1, heads=1, vocabulary=12_288)
"""States as wide as Nano's from a model that is loaded at once: it never runs."""


@dataclass(frozen=True)
class Mark:
    """A moment on the clock of the device that is not there."""

    at_s: float

    def synchronize(self) -> None:
        time.sleep(max(0.0, self.at_s - time.perf_counter()))

    def elapsed_time(self, other: Mark) -> float:
        """Return milliseconds, as a CUDA event does."""
        return max(0.0, 1000 * (other.at_s - self.at_s))


@dataclass
class Queue:
    """A device that does one batch after the other at a given speed."""

    tokens_per_s: float
    states: torch.Tensor
    free_at_s: float = 0.0

    def start(self, tokens: Sequence[PassageTokens], ratio: int) -> BatchInFlight:
        ids = torch.tensor(np.concatenate([passage.ids for passage in tokens]))
        groups = sum(num_groups(len(passage.ids), ratio) for passage in tokens)
        begin = max(time.perf_counter(), self.free_at_s)
        self.free_at_s = end = begin + len(ids) / self.tokens_per_s
        marks = (Mark(begin), Mark(begin), Mark(end), Mark(end))
        pooled = self.states[:groups], torch.ones(groups, dtype=torch.bool)
        return BatchInFlight(tokens, len(ids), ratio, pooled, marks)


@dataclass
class Ceiling:
    """An executor that encodes rounds of shards on a queue, and what it measured."""

    speed: float
    shards_in_flight: int
    tokens: list[int] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    tokenise_s: list[float] = field(default_factory=list)
    stages: Counter[str] = field(default_factory=Counter)

    def execute(self, work: Work, shards: Sequence[Unit]) -> Generator[Outcome]:
        if not isinstance(work, EncodeWork):
            yield from in_process(work, shards)
            return
        encoder, reader = ShardEncoder(work.table, work.spec), ShardReader()
        encoder.encoder.use_fast_tokenizer()  # as beside a GPU
        self._warm_up(encoder, shards, Path(work.table.uri, "data"))
        rounds = min(ROUNDS, len(shards))
        for chosen in (shards[i::rounds] for i in range(rounds)):
            texts = [[p.text for p in reader.read(shard)[0]] for shard in chosen]
            _, _, alone = self._measure(encoder.encoder.tokenise, texts)
            results, wall, cpu = self._measure(encoder.do, chosen)
            self.tokens.append(sum(result.num_tokens for result in results))
            self.tokenise_s.append(alone)
            self.wall_s.append(wall)
            self.cpu_s.append(cpu)
            for result in results:
                self.stages.update(result.seconds)
            yield from results

    def _warm_up(self, encoder: ShardEncoder, shards: Sequence[Shard], folder: Path) -> None:
        """Encode everything once and remove it.

        A virtual machine counts the first touch of a page of its memory, the page cache's too, as
        time of its CPU: several times what the write itself takes.
        """
        before = set(folder.glob("*"))
        self._measure(encoder.do, shards)
        for file in set(folder.glob("*")) - before:
            file.unlink()

    def _measure(self, work: Callable, items: Sequence) -> tuple[list[ShardResult], float, float]:
        """Return what came back, the seconds on the clock and those of all CPUs."""
        began = time.perf_counter(), time.process_time()
        with ThreadPoolExecutor(self.shards_in_flight) as pool:
            results = list(pool.map(work, items))
        return results, time.perf_counter() - began[0], time.process_time() - began[1]

    def print(self, num_shards: int) -> None:
        tokens, wall = sum(self.tokens), sum(self.wall_s)
        busy = tokens / self.speed / wall
        print(
            f"device {self.speed / 1e6:.1f}M tokens/s, {self.shards_in_flight} shards in flight: "
            f"{tokens} tokens, {tokens / wall / 1e3:.0f}k tokens/s, device busy {busy:.0%}"
        )
        stages = (f"{name} {1000 * s / num_shards:.0f}" for name, s in self.stages.items())
        print(f"ms per shard: {', '.join(stages)}")
        for name, spent in {"host": self.cpu_s, "tokenising alone": self.tokenise_s}.items():
            rates = [n / s / 1e3 for n, s in zip(self.tokens, spent, strict=True)]
            print(f"{name}: {spread(rates)} thousand tokens per core-second")
        ratios = [a / b for a, b in zip(self.cpu_s, self.tokenise_s, strict=True)]
        print(f"host over tokenise: {spread(ratios)}")


def bars() -> list[str]:
    """Return the bar of `make bench`: each store dtype in a process of its own."""
    from tests.bench.encode import run_process

    for dtype in ("int8", "float16"):
        printed, _ = run_process(__spec__.name, 1e9, 2, "--store-dtype", dtype)
        print(f"{dtype}\n{printed}", end="", flush=True)
    found = re.search(r"host over tokenise: median ([\d.]+)", printed)
    return [bar("host_over_tokenise", float(found[1]), "<=", 1.4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speed", type=float, help="tokens per second of the device")
    parser.add_argument("shards_in_flight", type=int)
    parser.add_argument("--passages", type=int, default=10_000)
    parser.add_argument("--store-dtype", default="float16")
    parser.add_argument("--model", help="a checkpoint; default: one with the demo's tokenizer")
    chosen = parser.parse_args()
    ceiling = Ceiling(chosen.speed, chosen.shards_in_flight)
    dtype = torch.float16 if chosen.store_dtype == "float16" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        job = _job(Path(folder), chosen.passages, chosen.model, chosen.store_dtype)
        width = checkpoint.resolve(job.model).config.decoder.hidden_size
        _replace_device(Queue(chosen.speed, torch.randn(20_000, width).to(dtype)))
        run(job, ceiling.execute)
    ceiling.print(-(-chosen.passages // SHARD_SIZE))


def _job(folder: Path, passages: int, model: str | None, store_dtype: str) -> EncodeJob:
    words = " ".join(d["text"] for d in standard_library_docs()).split()
    rng = random.Random(0)
    # A word of the documentation has about 1.8 tokens.
    counts = [max(3, length * 11 // 20) for length in ms_marco_lengths(passages)]
    texts = [" ".join(rng.choices(words, k=count)) for count in counts]
    return EncodeJob(
        inputs=(str(write_corpus(folder / "corpus.jsonl", texts)),),
        uri=str(folder / "passages.lance"),
        model=model or _with_tokenizer_of_the_demo(folder / "model"),
        ratios=(RATIO,),
        store_dtype=store_dtype,
        shard_size=SHARD_SIZE,
    )


def _with_tokenizer_of_the_demo(folder: Path) -> str:
    make_checkpoint(folder, (d["text"] for d in standard_library_docs()), dimensions=WIDE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.resolve(checkpoint.DEMO_NAME).path / name, folder)
    return str(folder)


def _replace_device(queue: Queue) -> None:
    """Let the pipeline take the queue for a GPU: one thread, large batches, waiting behind it."""
    run_batch = ShardEncoder._run

    def run_ahead(self, batch):
        started = run_batch(self, batch)
        self._on_gpu.extend(started)
        while len(self._on_gpu) > shard_encoder.BATCHES_AHEAD:
            self._on_gpu.popleft().result()
        return started

    PassageEncoder._start = lambda self, tokens, ratio, dtype, limit: queue.start(tokens, ratio)
    ShardEncoder._run = run_ahead
    encoder_module.CPU_TOKEN_BUDGET = GPU_TOKEN_BUDGET
    device_threads.MOST_DEVICE_THREADS = 1
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
