"""What int8 and int4 cost in time beside float16, at Nano's width and passages of 128 tokens.

Reading is what a reranker does with 100 rows: from ids to the padded float32 states of a decoder.
Writing is what a worker does with a shard: from float32 states to a fragment.
"""

from __future__ import annotations

import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.model.pairs import Pair, Prompt, memory_of
from kalm_encoder.table.location import Location
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from pipeline.table.fragments import write_fragment, write_once
from tests.bench.data import bar, spread, timed
from tests.bench.take import IDS, NANO_DIM, NANO_STATES, open_table, random_table

DTYPES = ("float16", "int8", "int4")
ROWS, TIMES = 2_000, 20


def main() -> list[str]:
    read, written = _in_turn(_readers()), _in_turn(_writers())
    return [
        bar("read_int4_time", read["int4"] / read["float16"], "<=", 1.5),
        bar("write_int4_speed", written["float16"] / written["int4"], ">=", 0.7),
    ]


def _in_turn(tasks: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Return the median seconds of each task; they run in turn, after some warm runs."""
    took: dict[str, list[float]] = {name: [] for name in tasks}
    for i in range(TIMES + 3):
        for name, task in tasks.items():
            seconds = timed(task)
            if i >= 3:
                took[name].append(seconds)
    for name, times in took.items():
        print(f"{name}: {spread([1000 * t for t in times])} ms")
    return {name: statistics.median(times) for name, times in took.items()}


def _readers() -> dict[str, Callable[[], None]]:
    prompt, rng = Prompt((1,), 0), random.Random(0)

    def reader(dtype: str) -> Callable[[], None]:
        uri = random_table(ROWS, dim=NANO_DIM, states=NANO_STATES, store_dtype=dtype)
        table = open_table(uri, indexed=True)

        def read() -> None:
            found = table.take([f"doc-{n}" for n in rng.sample(range(ROWS), IDS)])
            pairs = [Pair(prompt, passage.states) for passage in found]
            memory_of(pairs, torch.device("cpu"), torch.float32)

        return read

    return {dtype: reader(dtype) for dtype in DTYPES}


def _writers() -> dict[str, Callable[[], None]]:
    rng = np.random.default_rng(0)
    count = 500
    states = rng.standard_normal((count * NANO_STATES, NANO_DIM)).astype(np.float32)
    tokens = np.full(count, 4 * NANO_STATES)
    passages = PackedStates(states, tokens, np.zeros(count, bool))
    ids = [f"doc-{i}" for i in range(count)]
    texts = ["word " * 100] * count
    spec = TableSpec("none", None, "none", NANO_DIM, 1024, (4,))

    def writer(dtype: str) -> Callable[[], None]:
        own = replace(spec, store_dtype=dtype)
        place = Location(f"{tempfile.mkdtemp()}/{dtype}.lance")
        write_once(own.schema().empty_table(), place, own.schema())
        dataset = place.dataset()

        def write() -> None:
            write_fragment(build_rows(own, ids, texts, passages, "000000-bench"), dataset)

        return write

    return {dtype: writer(dtype) for dtype in DTYPES}
