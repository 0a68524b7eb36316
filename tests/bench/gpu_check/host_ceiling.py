"""How many tokens per second the host side of one worker can feed: the real pipeline, no device.

The device is replaced by a queue that takes tokens / SPEED seconds per batch and returns random
states, as a GPU would: behind the host's back, one batch after the other. Reading, tokenising,
packing, pooling's result, building rows and writing are the real code.

    python -m tests.bench.gpu_check.host_ceiling SPEED SHARDS_IN_FLIGHT

A SPEED of 1e9 tokens/s means no device at all. Give it two cores, as a worker has beside its GPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from jobs.demo import standard_library_docs
from kalm_encoder.matryoshka import num_groups
from kalm_encoder.model import encoder as encoder_module
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.in_flight import BatchInFlight, PassageTokens
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.workers import device_threads, local, shard_encoder
from pipeline.workers.shard_encoder import ShardEncoder
from tests.bench.data import write_corpus
from tests.bench.forwards import RATIO, ms_marco_lengths
from tests.support.random_model import TINY, make_checkpoint

SHARD_SIZE = 1_000
GPU_TOKEN_BUDGET = 65_536
WIDE = replace(TINY, hidden=640, intermediate=64, layers=1, heads=1)
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
    free_at_s: float = 0.0
    tokens: int = 0
    states: torch.Tensor = field(default_factory=lambda: torch.randn(40_000, WIDE.hidden))

    def start(self, tokens: Sequence[PassageTokens], ratio: int) -> BatchInFlight:
        ids = torch.tensor(np.concatenate([passage.ids for passage in tokens]))
        groups = sum(num_groups(len(passage.ids), ratio) for passage in tokens)
        begin = max(time.perf_counter(), self.free_at_s)
        self.free_at_s = end = begin + len(ids) / self.tokens_per_s
        self.tokens += len(ids)
        marks = (Mark(begin), Mark(begin), Mark(end), Mark(end))
        return BatchInFlight(tokens, len(ids), ratio, self.states[:groups], marks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("speed", type=float, help="tokens per second of the device")
    parser.add_argument("shards_in_flight", type=int)
    parser.add_argument("--passages", type=int, default=20_000)
    chosen = parser.parse_args()
    queue, seconds, started = Queue(chosen.speed), Counter[str](), []
    _replace_device(queue, chosen.shards_in_flight)
    encode = ShardEncoder.encode

    def noted(self, shard):
        started.append((time.perf_counter(), time.process_time()))
        result = encode(self, shard)
        seconds.update(result.seconds)
        return result

    ShardEncoder.encode = noted
    with tempfile.TemporaryDirectory() as folder:
        run(_job(Path(folder), chosen.passages), local.encode_inline)
    wall, cpu = time.perf_counter() - started[0][0], time.process_time() - started[0][1]
    print(
        f"device {chosen.speed / 1e6:.1f}M tokens/s, {chosen.shards_in_flight} shards in flight: "
        f"{queue.tokens} tokens, {queue.tokens / wall / 1e3:.0f}k tokens/s, device busy "
        f"{queue.tokens / chosen.speed / wall:.0%}"
    )
    stages = ", ".join(f"{name} {1000 * s / len(started):.0f}" for name, s in seconds.items())
    print(f"ms per shard: {stages}")
    print(f"CPU {cpu:.1f} s: {queue.tokens / cpu / 1e3:.0f}k tokens per core-second")


def _job(folder: Path, passages: int) -> EncodeJob:
    words = " ".join(d["text"] for d in standard_library_docs()).split()
    rng = random.Random(0)
    # A word of the documentation has about 1.8 tokens.
    counts = [max(3, length * 11 // 20) for length in ms_marco_lengths(passages)]
    texts = [" ".join(rng.choices(words, k=count)) for count in counts]
    return EncodeJob(
        inputs=(str(write_corpus(folder / "corpus.jsonl", texts)),),
        uri=str(folder / "passages.lance"),
        model=str(make_checkpoint(folder / "model", texts[:2000], dimensions=WIDE)),
        ratios=(RATIO,),
        shard_size=SHARD_SIZE,
    )


def _replace_device(queue: Queue, shards_in_flight: int) -> None:
    """Let the pipeline take the queue for a GPU: one thread, large batches, waiting behind it."""
    run_batch = ShardEncoder._run

    def run_ahead(self, batch):
        started = run_batch(self, batch)
        self._on_gpu.extend(started)
        while len(self._on_gpu) > shard_encoder.BATCHES_AHEAD:
            self._on_gpu.popleft().result()
        return started

    PassageEncoder._start = lambda self, tokens, ratio: queue.start(tokens, ratio)
    ShardEncoder._run = run_ahead
    local.IN_FLIGHT = shards_in_flight
    encoder_module.CPU_TOKEN_BUDGET = GPU_TOKEN_BUDGET
    device_threads.MOST_DEVICE_THREADS = 1
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
