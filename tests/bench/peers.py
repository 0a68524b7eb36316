"""Other ways to encode a corpus, one per process: `python -m tests.bench.peers PEER MODEL CORPUS`.

ceiling        the bare encoder: tokenised beforehand, all passages sorted by length, full token
               budgets, one forward per device thread; forward and pooling, nothing else
reference      mteb's KaLMRerankerWrapper, encoder part only: 32 pairs of query and passage, sorted
               by characters, padded
ray_data       Ray Data map_batches: 32 rows in corpus order, one actor with all CPUs
long_passages  no peer: our forward and the model's own on the same long passages, in turn

All but the ceiling run the model's own padded forward and tokenise batch by batch. All pool at
ratio 4 and hand float32 states back on the CPU. Loading and one warm-up batch are not timed.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from kalm_encoder import PassageEncoder
from kalm_encoder.model import checkpoint
from kalm_encoder.model.in_flight import PassageTokens
from kalm_encoder.model.pooling import mean_pool
from kalm_encoder.prompts import render_passage
from pipeline.workers.device_threads import DeviceThreads, keep_freed_memory
from tests.bench.forwards import RATIO, plain_states

ROWS = 32
MAX_LENGTH = 1024
WARM_UP = ["a passage of few words"] * 8
LONG_BATCHES = {"long_passages": [1024] * 4, "long_passages_mixed": [600, 741, 883, 1024]}


class PlainEncoder:
    """The checkpoint's text encoder as transformers runs it."""

    def __init__(self, model: str) -> None:
        files = checkpoint.resolve(model)
        self.model = files.load_text_encoder(None, None)
        self.tokenizer = files.tokenizer()

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, int, int]:
        """Return (b, m, d) states of one batch, its tokens, and the tokens with padding."""
        batch = self.tokenizer(
            [render_passage(text) for text in texts],
            padding=True,
            truncation=True,
            max_length=MAX_LENGTH,
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.model.device)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return mean_pool(hidden, mask, RATIO).cpu().numpy(), int(mask.sum()), mask.numel()


def by_pair(texts: Sequence[str]) -> list[int]:
    """Return the reference's order: characters of a query, 20 to 80 of them, and the passage."""
    rng = random.Random(0)
    sizes = [len(text) + rng.randint(20, 80) for text in texts]
    return sorted(range(len(texts)), key=sizes.__getitem__, reverse=True)


def run_reference(model: str, texts: Sequence[str]) -> dict[str, float]:
    """Encode batches of 32 with the model's own forward."""
    encoder = PlainEncoder(model)
    encoder.encode(WARM_UP)
    order = by_pair(texts)
    tokens = computed = 0
    began = time.perf_counter()
    for start in range(0, len(order), ROWS):
        _, real, padded = encoder.encode([texts[i] for i in order[start : start + ROWS]])
        tokens, computed = tokens + real, computed + padded
    return {"tokens": tokens, "computed": computed, "seconds": time.perf_counter() - began}


def run_ceiling(model: str, texts: list[str]) -> dict[str, float]:
    """Encode with PassageEncoder on packed batches of the whole corpus, sorted by length.

    Malloc is told what a worker tells it: without that ours is 1.08 times as fast as its ceiling.
    """
    keep_freed_memory()
    encoder = PassageEncoder(model)
    encoder.encode(WARM_UP, ratio=RATIO)
    tokens = sorted(encoder.tokenise(texts), key=lambda t: -len(t.ids))
    lengths = [len(t.ids) for t in tokens]
    batches = encoder.batches(tokens)
    threads = DeviceThreads(encoder.device)
    began = time.perf_counter()
    threads.map(partial(encoder.encode_batch, ratio=RATIO), batches)
    seconds = time.perf_counter() - began
    return {"tokens": sum(lengths), "computed": sum(lengths), "seconds": seconds}


class RayDataActor:
    """What map_batches calls: it returns counts and times, not states, to leave Ray out of it."""

    def __init__(self, model: str) -> None:
        self.encoder = PlainEncoder(model)
        self.encoder.encode(WARM_UP)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Encode one batch."""
        began = time.time()
        _, tokens, computed = self.encoder.encode(list(batch["text"]))
        counts = {"tokens": tokens, "computed": computed, "began": began, "ended": time.time()}
        return {name: [value] for name, value in counts.items()}


def run_ray_data(model: str, corpus: str) -> dict[str, float]:
    """Read, batch and encode with Ray Data; timed from the first batch's start to the last's end.

    One CPU more than there are lets the reading task run beside an actor that has all of them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    cores = len(os.sched_getaffinity(0))
    ray.init(
        address="local",
        num_cpus=cores + 1,
        include_dashboard=False,
        object_store_memory=200_000_000,
        log_to_driver=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = (
        ray.data.read_json(corpus, lines=True, override_num_blocks=1)
        .map_batches(
            RayDataActor,
            fn_constructor_args=(os.path.abspath(model),),
            batch_size=ROWS,
            num_cpus=cores,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    ray.shutdown()
    return {
        "tokens": sum(row["tokens"] for row in rows),
        "computed": sum(row["computed"] for row in rows),
        "seconds": max(row["ended"] for row in rows) - min(row["began"] for row in rows),
    }


def run_long_passages(model: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """Time both forwards on each of LONG_BATCHES in turn, pooling included.

    Returns:
        By batch, for each round: the plain forward's wall and CPU seconds over ours.
    """
    encoder, plain_encoder = PassageEncoder(model), PlainEncoder(model)
    encoder.encode(WARM_UP, ratio=RATIO)
    plain_encoder.encode(WARM_UP)
    rng = random.Random(0)
    vocabulary = len(encoder.tokenizer)
    times: dict[str, list[dict[str, float]]] = {}
    for name, lengths in LONG_BATCHES.items():
        ids = [[rng.randrange(10, vocabulary) for _ in range(n)] for n in lengths]
        tokens = [PassageTokens(row, False) for row in ids]
        times[name] = []
        for _ in range(rounds):
            ours = _clock(lambda tokens=tokens: encoder.encode_batch(tokens, ratio=RATIO))
            plain = _clock(lambda ids=ids: plain_states(plain_encoder.model, ids))
            times[name].append({"wall": plain[0] / ours[0], "cpu": plain[1] / ours[1]})
    return times


def _clock(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main(peer: str, model: str, argument: str) -> None:
    """Run one peer and print its counts as the last line, JSON."""
    counts: Any
    if peer == "long_passages":
        counts = run_long_passages(model, int(argument))
    elif peer == "ray_data":
        counts = run_ray_data(model, argument)
    else:
        with open(argument) as lines:
            texts = [json.loads(line)["text"] for line in lines]
        counts = {"ceiling": run_ceiling, "reference": run_reference}[peer](model, texts)
    print(json.dumps(counts))


if __name__ == "__main__":
    main(*sys.argv[1:])
