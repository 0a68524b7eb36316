"""The encoder on a CUDA device against the device's own matrix products; `--toy` for any machine.

Nano, Small and Large dimensions with random weights, made on the device, no checkpoint needed.
`of rate` is 2 x non-embedding parameters x real tokens a second over the measured rate of large
square products in the same dtype: padding, attention and everything else count as waste.

    python -m tests.bench.gpu --sizes Nano Large --seconds 10
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2RotaryEmbedding,
    T5Gemma2TextEncoder,
)

from jobs.demo_training.architecture import LARGE, NANO, SMALL, TINY, Dimensions, configuration
from kalm_encoder import PassageEncoder
from kalm_encoder.model import checkpoint
from kalm_encoder.model.in_flight import PassageTokens
from pipeline.estimate.flops import Shape
from tests.bench.data import bar, ms_marco_lengths
from tests.bench.peers import RATIO, plain_states

SIZES = {"Nano": NANO, "Small": SMALL, "Large": LARGE}
GOALS = {"Nano": 0.35, "Large": 0.5}
VARIANTS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compile": True}}
"""Options of PassageEncoder to compare."""
BUDGETS = 4
"""Token budgets that the passages of one pass fill."""
PROFILED = 4
"""Batches under the profiler."""


@dataclass(frozen=True)
class Figures:
    """One size, one variant, one distribution of lengths.

    Attributes:
        tokens_per_s: real tokens.
        over_padded: speed over that of the model's own forward on the same batches, padded.
        busy: share of the time in which the device ran a kernel; None on a CPU.
        warm_up_s: of the first pass: kernels chosen, graphs compiled.
        peak_bytes: of device memory; None on a CPU.
    """

    tokens_per_s: float
    over_padded: float
    busy: float | None
    warm_up_s: float
    peak_bytes: int | None


def matmul_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Return operations a second of n x n products: the best of five, ten each."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    torch.matmul(a, b)
    times = [timed(device, lambda: [torch.matmul(a, b) for _ in range(10)]) for _ in range(5)]
    return 10 * 2 * n**3 / min(times)


def random_encoder(
    dimensions: Dimensions, tokenizer: Any, device: torch.device, dtype: torch.dtype
) -> T5Gemma2TextEncoder:
    """Build a text encoder with random weights in the device's own memory."""
    config = configuration(dimensions, tokenizer)
    with torch.device("meta"):
        model = T5Gemma2TextEncoder(config.encoder.text_config, config.eoi_token_index)
    model = model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        # Gemma's norms multiply by 1 + weight.
        torch.nn.init.normal_(parameter, std=0.0 if "norm" in name else 0.02)
    model.rotary_emb = T5Gemma2RotaryEmbedding(model.config).to(device)
    embedding = model.embed_tokens
    embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    return model.requires_grad_(False).eval()


def measure(encoder: PassageEncoder, lengths: Sequence[int], seconds: float) -> Figures:
    """Encode passages of these lengths, again and again for at least so many seconds."""
    device, rng = encoder.device, random.Random(0)
    tokens = [
        PassageTokens([rng.randrange(10, 6000) for _ in range(length)], False) for length in lengths
    ]
    batches = [[tokens[i] for i in batch] for batch in encoder.batches(lengths)]

    def ours(some: Sequence[list[PassageTokens]]) -> None:
        started = [s for batch in some for s in encoder.start(batch, ratio=RATIO)]
        for one in started:
            one.result()

    def padded() -> None:
        for batch in batches:
            plain_states(encoder.model, [t.ids for t in batch])

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    warm_up_s = timed(device, lambda: ours(batches))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    times = repeated(device, lambda: ours(batches), seconds)
    some = batches[:: -(-len(batches) // PROFILED)]
    busy = None
    if device.type == "cuda":
        busy = kernel_seconds(lambda: ours(some)) / timed(device, lambda: ours(some))
    plain = repeated(device, padded, seconds / 2)
    return Figures(
        sum(lengths) / statistics.median(times),
        statistics.median(plain) / statistics.median(times),
        busy,
        warm_up_s,
        peak,
    )


def repeated(device: torch.device, work: Callable[[], object], seconds: float) -> list[float]:
    """Time work as often as fits into so many seconds, at least once."""
    times = [timed(device, work)]
    while sum(times) < seconds:
        times.append(timed(device, work))
    return times


def timed(device: torch.device, work: Callable[[], object]) -> float:
    """Return seconds until the device is done."""
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def kernel_seconds(work: Callable[[], object]) -> float:
    """Return how long at least one kernel or copy ran on the CUDA device.

    The profiler slows the host, not the kernels: divide by the time without it.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    ranges = [
        event.time_range
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    return covered([(r.start, r.end) for r in ranges]) / 1e6


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals: (0, 2), (1, 3), (5, 6) cover 4."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def main(arguments: Sequence[str] = ()) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seconds", type=float, default=5.0, help="of one measurement at least")
    parser.add_argument("--toy", action="store_true", help="a tiny model, on a CPU too")
    chosen = parser.parse_args(arguments)
    device = checkpoint.choose_device(None)
    if device.type == "cpu" and not chosen.toy:
        print("no CUDA device: not measured (--toy shows that the script works)")
        return []
    sizes = {"Toy": TINY} if chosen.toy else {name: SIZES[name] for name in chosen.sizes}
    dtype = checkpoint.choose_dtype(None, device)
    rate = matmul_rate(device, dtype, 256 if chosen.toy else 8192)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}: {rate / 1e12:.3g} T operations/s of {dtype} products")
    print("size   variant   lengths   budget  tokens/s  of rate  busy  over padded  warm-up  peak")
    tokenizer = checkpoint.resolve(checkpoint.DEMO_NAME).tokenizer()
    bars = []
    for size, dimensions in sizes.items():
        model = random_encoder(dimensions, tokenizer, device, dtype)
        token_rate = rate / (2 * Shape.of(model.config).params)
        shares = []
        for variant in ["eager"] if chosen.toy else VARIANTS:
            encoder = PassageEncoder(model, tokenizer, **VARIANTS[variant])
            for kind, lengths in passage_lengths(encoder.token_budget).items():
                figures = measure(encoder, lengths, 0 if chosen.toy else chosen.seconds)
                share = figures.tokens_per_s / token_rate
                print(f"{size:<6} {variant:<9} {kind:<9} {encoder.token_budget:6}", end=" ")
                print_figures(figures, share)
                shares += [share] if kind == "128" else []
        if size in GOALS:
            bars.append(bar(f"gpu_{size.lower()}", max(shares), ">=", GOALS[size]))
        del model, encoder
    return bars


def print_figures(figures: Figures, share: float) -> None:
    """Print the rest of a line of the table."""
    busy = "-" if figures.busy is None else f"{figures.busy:.0%}"
    peak = "-" if figures.peak_bytes is None else f"{figures.peak_bytes / 2**30:.1f} GiB"
    print(
        f"{figures.tokens_per_s:9,.0f} {share:8.1%} {busy:>5} {figures.over_padded:12.2f} "
        f"{figures.warm_up_s:7.1f}s  {peak}",
        flush=True,
    )


def passage_lengths(token_budget: int) -> dict[str, list[int]]:
    """Return the lengths of BUDGETS token budgets of passages."""
    tokens = BUDGETS * token_budget
    return {"128": [128] * (tokens // 128), "MS MARCO": ms_marco_lengths(tokens // 80)}


if __name__ == "__main__":
    print("\n".join(main(sys.argv[1:])))
