"""What the benchmarks share: a Nano-sized checkpoint, passages of given token lengths, bars."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import psutil

from jobs.demo import standard_library_docs
from jobs.demo_training.architecture import NANO
from tests.support.random_model import make_checkpoint

FOLDER = Path("bench-data")


def nano_checkpoint() -> Path:
    """Random weights, real dimensions: 100M parameters a half, 168M in the embedding."""
    folder = FOLDER / "nano"
    if not (folder / "model.safetensors").exists():
        make_checkpoint(folder, (d["text"] for d in standard_library_docs()), dimensions=NANO)
    return folder


def passages_of(tokenizer, lengths: list[int], *, seed: int = 0) -> list[str]:
    """Real documentation cut so that each passage has the wanted tokens, prefix included.

    White space is single: indented code has far more tokens a character than prose, and would be
    unfair to peers that sort by characters.
    """
    ids = tokenizer(_documentation(), add_special_tokens=False)["input_ids"]
    prefix = len(tokenizer("<Document>: ", add_special_tokens=False)["input_ids"])
    rng = random.Random(seed)
    return [_passage(tokenizer, ids, length, prefix, rng) for length in lengths]


@cache
def _documentation() -> str:
    return " ".join(" ".join(d["text"].split()) for d in standard_library_docs())


def _passage(tokenizer, ids: list[int], length: int, prefix: int, rng: random.Random) -> str:
    """Cut at random places until a cut has exactly `length` tokens: a piece may fall apart."""
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


def ms_marco_lengths(count: int, *, seed: int = 0) -> list[int]:
    """Log-normal token lengths with mean about 80, as MS MARCO passages have."""
    rng = random.Random(seed)
    return [max(12, min(300, round(rng.lognormvariate(4.28, 0.45)))) for _ in range(count)]


def web_lengths(count: int, *, seed: int = 0) -> list[int]:
    """Log-normal token lengths of web documents cut at 1024: a quarter of them is at the cut."""
    rng = random.Random(seed)
    return [max(12, min(1024, round(rng.lognormvariate(6.2, 1.0)))) for _ in range(count)]


def equal_lengths(count: int) -> list[int]:
    """All 128."""
    return [128] * count


def adversarial_lengths(count: int) -> list[int]:
    """One row of 1024 in each 32, the others about 40: the worst for batches in corpus order."""
    return [1024 if i % 32 == 7 else 36 + i % 9 for i in range(count)]


DISTRIBUTIONS: dict[str, Callable[[int], list[int]]] = {
    "ms-marco": ms_marco_lengths,
    "equal": equal_lengths,
    "web": web_lengths,
    "adversarial": adversarial_lengths,
}
"""Token lengths of the first passages of a corpus, by its name."""


def write_corpus(file: Path, texts: list[str]) -> Path:
    """Write passages as JSON lines, numbered from 0."""
    lines = (json.dumps({"_id": str(i), "text": text}) + "\n" for i, text in enumerate(texts))
    file.write_text("".join(lines))
    return file


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
