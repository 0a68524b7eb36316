"""The device, the models to measure and the clock: what all sections of the GPU check share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pipeline.estimate.flops import MODELS, Dimensions
from tests.bench.forwards import random_encoder
from tests.support.random_model import TINY

SIZES = MODELS
TOY = {"Toy": replace(TINY, vocabulary=12288)}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.bfloat16
START = time.perf_counter()


@dataclass(frozen=True)
class Setting:
    """What the sections measure with.

    Attributes:
        sizes: Dimensions by name.
        tokenizer: That of the demo checkpoint; its specials are those of all models here.
        toy: Whether to do little of everything.
    """

    sizes: dict[str, Dimensions]
    tokenizer: Any
    toy: bool

    def encoder(self, size: str) -> Any:
        return random_encoder(self.sizes[size], self.tokenizer, DEVICE, HALF)


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - START:5.0f}s]", *words, flush=True)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Return the time until the device is done."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def median_ms(work: Callable[[], object], repeats: int = 10, warm: int = 2) -> float:
    for _ in range(warm):
        work()
    return 1000 * statistics.median(seconds(work) for _ in range(repeats))
