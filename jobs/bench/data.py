"""What the benchmarks share: a Nano-sized checkpoint, passages of given token lengths, bars."""

from __future__ import annotations

import random
import statistics
from pathlib import Path

import psutil

from jobs.demo import standard_library_docs
from jobs.demo_model import make_checkpoint
from kalm_train.architecture import NANO

FOLDER = Path("bench-data")


def nano_checkpoint() -> Path:
    """Random weights, real dimensions: 100M parameters a half, 168M in the embedding."""
    folder = FOLDER / "nano"
    if not (folder / "model.safetensors").exists():
        make_checkpoint(folder, (d["text"] for d in standard_library_docs()), dimensions=NANO)
    return folder


def passages_of(tokenizer, lengths: list[int], *, seed: int = 0) -> list[str]:
    """Real documentation cut so that each passage has the wanted tokens, prefix included."""
    text = " ".join(d["text"] for d in standard_library_docs())
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    prefix = len(tokenizer("<Document>: ", add_special_tokens=False)["input_ids"])
    rng = random.Random(seed)
    made = []
    for length in lengths:
        want = length - prefix
        start = rng.randrange(len(ids) - 2 * length)
        passage = ""
        for extra in range(0, 20):
            passage = tokenizer.decode(ids[start : start + want + extra]).strip()
            got = len(tokenizer("<Document>: " + passage, add_special_tokens=False)["input_ids"])
            if got >= length:
                break
        made.append(passage)
    return made


def ms_marco_lengths(count: int, *, seed: int = 0) -> list[int]:
    """Log-normal token lengths with mean about 80, as MS MARCO passages have."""
    rng = random.Random(seed)
    return [max(12, min(300, round(rng.lognormvariate(4.28, 0.45)))) for _ in range(count)]


def check_idle() -> None:
    """Say so when another process uses the machine: figures would mean nothing."""
    load = psutil.cpu_percent(interval=1.0)
    if load > 25:
        print(f"WARNING: {load:.0f} % CPU in use before the benchmark: figures are unreliable")


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.4g} ({min(values):.4g} to {max(values):.4g})"


def bar(name: str, value: float, op: str, goal: float) -> str:
    """One machine-readable figure."""
    return f"bar {name} {value:.3g} {op} {goal:g}"
