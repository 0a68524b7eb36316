"""The executor without Ray: it encodes shards in this process."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from pipeline import logs
from pipeline.corpus.shards import Shard
from pipeline.messages import Outcome, ShardFailure, WorkerConfig, shards_in_flight
from pipeline.workers.shard_encoder import ShardEncoder


def encode_inline(config: WorkerConfig, shards: Sequence[Shard]) -> Generator[Outcome]:
    """Encode shards in this process and yield them in order; they overlap as in a Ray worker.

    Raises:
        KalmError: If the encoder cannot be loaded.
    """
    encoder = ShardEncoder(config)

    def attempt(shard: Shard) -> Outcome:
        try:
            with logs.in_shard(shard.id):
                return encoder.encode(shard)
        except Exception as error:  # any error belongs to its shard; the others go on
            return ShardFailure(shard, 1, f"{type(error).__name__}: {error}")

    waiting = iter(shards)
    on_gpu = encoder.encoder.device.type == "cuda"
    count = shards_in_flight(len(os.sched_getaffinity(0)), on_gpu=on_gpu)
    with ThreadPoolExecutor(count, "shard") as pool:
        running = deque(pool.submit(attempt, shard) for shard in islice(waiting, count))
        try:
            while running:
                outcome = running.popleft().result()
                running.extend(pool.submit(attempt, shard) for shard in islice(waiting, 1))
                yield outcome
        finally:
            encoder.stop()
