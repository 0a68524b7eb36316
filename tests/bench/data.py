"""What the benchmarks share: a checkpoint of Nano's dimensions, passages, tables, clocks, bars."""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil

from jobs.demo import standard_library_docs
from pipeline.estimate.flops import MODELS, Dimensions
from pipeline.run.driver import run
from pipeline.run.job import EncodeJob
from pipeline.workers.local import in_process
from tests.support.random_model import TINY, make_checkpoint

FOLDER = Path("bench-data")
QUERY = "how do I read a compressed file line by line without loading all of it"


def on_one_cpu(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run a function in a process of its own that has the first CPU alone, and return its result.

    The process has one CPU from its start, so that no library in it makes threads for more.
    """
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(run, *arguments).result()
    finally:
        os.sched_setaffinity(0, cpus)


def checkpoint_of(name: str, dimensions: Dimensions) -> str:
    """Return a checkpoint with random weights; it is made once and kept for the next run."""
    folder = FOLDER / name
    if not (folder / "model.safetensors").exists():
        make_checkpoint(folder, (d["text"] for d in standard_library_docs()), dimensions=dimensions)
    return str(folder)


def nano_checkpoint() -> str:
    """Return Nano's dimensions: 100M parameters per half and 168M in the embedding."""
    return checkpoint_of("nano", MODELS["Nano"])


def tiny_checkpoint() -> str:
    """Return a model so small that the rest of the pipeline takes most of the time."""
    return checkpoint_of("tiny", TINY)


def passages_of(tokenizer: Any, lengths: Sequence[int], *, seed: int = 0) -> list[str]:
    """Cut real documentation so that each passage has the wanted tokens, prefix included.

    White space is single: indented code has far more tokens per character than prose, and would be
    unfair to peers that sort by characters.
    """
    ids = tokenizer(_documentation(), add_special_tokens=False)["input_ids"]
    prefix = len(tokenizer("<Document>: ", add_special_tokens=False)["input_ids"])
    rng = random.Random(seed)
    return [_passage(tokenizer, ids, length, prefix, rng) for length in lengths]


@cache
def _documentation() -> str:
    return " ".join(" ".join(d["text"].split()) for d in standard_library_docs())


def _passage(tokenizer: Any, ids: list[int], length: int, prefix: int, rng: random.Random) -> str:
    """Cut at random places until a cut has exactly `length` tokens: a token may fall apart."""
    for _ in range(100):
        start = rng.randrange(len(ids) - 2 * length)
        for end in range(start + length - prefix, start + length + 20):
            passage = tokenizer.decode(ids[start:end]).strip()
            got = len(tokenizer("<Document>: " + passage, add_special_tokens=False)["input_ids"])
            if got == length:
                return passage
            if got > length:
                break
    raise ValueError(f"no passage of {length} tokens found: the tokenizer is not this text's")


def write_corpus(file: Path, texts: Sequence[str]) -> Path:
    """Write passages as JSON lines, numbered from 0."""
    lines = (json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    file.write_text("".join(lines))
    return file


def job_of(name: str, texts: Sequence[str], model: str, **options: Any) -> EncodeJob:
    """Return a job for a corpus and a table of this name; a table from before is removed."""
    shutil.rmtree(FOLDER / f"{name}.lance", ignore_errors=True)
    corpus = write_corpus(FOLDER / f"{name}.jsonl", texts)
    return EncodeJob(
        inputs=(str(corpus),), uri=str(FOLDER / f"{name}.lance"), model=model, **options
    )


def encode(name: str, texts: Sequence[str], model: str, **options: Any) -> str:
    """Encode passages into a fresh table; return its address."""
    job = job_of(name, texts, model, **options)
    run(job, in_process)
    return job.uri


def warn_if_busy() -> None:
    """Say so when another process uses the machine: the figures would mean nothing."""
    load = psutil.cpu_percent(interval=1.0)
    if load > 25:
        print(f"WARNING: {load:.0f} % CPU in use before the benchmark: figures are unreliable")


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> str:
    """Return the median and the range, for people."""
    return f"median {statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def bar(name: str, value: float, op: str, goal: float) -> str:
    """Return one figure and its goal, for machines."""
    return f"bar {name} {value:.3g} {op} {goal:g}"
