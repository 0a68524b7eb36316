"""What the device runs: how long it is busy, and which kernels take most of the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.encoder_forward import PackedForward
from kalm_encoder.model.in_flight import PassageTokens
from kalm_encoder.model.pairs import Pair
from tests.bench.forwards import RATIO, in_memory, ms_marco_lengths, random_decoder
from tests.bench.gpu_check.device import CUDA, DEVICE, HALF, Setting, say


def kernel_seconds(work: Callable[[], object]) -> float:
    """Return how long at least one kernel or copy ran on the CUDA device.

    The profiler slows the host, not the kernels: divide by the time without it.
    """
    with _profiled(ProfilerActivity.CUDA) as profiler:
        work()
    ranges = [
        event.time_range
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return covered([(r.start, r.end) for r in ranges]) / 1e6


@contextmanager
def _profiled(*activities: ProfilerActivity) -> Iterator[Any]:
    with profile(activities=activities) as profiler:
        yield profiler
        torch.cuda.synchronize()


def covered(intervals: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of intervals: (0, 2), (1, 3), (5, 6) cover 4."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def batches_of(encoder: PassageEncoder, lengths: Sequence[int]) -> list[list[PassageTokens]]:
    rng = np.random.default_rng(0)
    tokens = [PassageTokens(rng.integers(10, 6000, n), False) for n in lengths]
    return encoder.batches(tokens)


def print_top_kernels(setting: Setting) -> list[str]:
    """Print what takes most of a batch of 65,536 tokens, and of 10 and 100 candidates."""
    if not CUDA:
        say("profile: no CUDA device")
        return []
    for size in [n for n in ("Nano", "Large") if n in setting.sizes]:
        model = setting.encoder(size)
        for fuse in (False, True):
            encoder = PassageEncoder(in_memory(model, setting.tokenizer), token_budget=65536)
            encoder._forward = PackedForward(model, fuse=fuse)
            batch = batches_of(encoder, [128] * 512)[0]
            label = f"encoder {size} {'fused' if fuse else 'plain'}"
            _print_kernels(label, partial(encoder.encode_batch, batch, ratio=RATIO))
        del model, encoder
        decoder = QueryDecoder(
            in_memory(
                random_decoder(setting.sizes[size], setting.tokenizer, DEVICE, HALF),
                setting.tokenizer,
            )
        )
        for count in (10, 100):
            pairs = random_pairs(decoder, count)
            _print_kernels(f"decoder {size} {count}", partial(decoder.score_pairs, pairs))
    return []


def random_pairs(decoder: QueryDecoder, count: int) -> list[Pair]:
    """Return one query with random states of as many passages, as long as MS MARCO's."""
    prompt = decoder.prompt("how many people live in the capital of the country")
    rng = np.random.default_rng(0)
    return [
        Pair(prompt, rng.standard_normal((-(-n // RATIO), decoder.dim)).astype("f2"))
        for n in ms_marco_lengths(count)
    ]


def _print_kernels(label: str, work: Callable[[], object]) -> None:
    for _ in range(2):
        work()
    with _profiled(ProfilerActivity.CPU, ProfilerActivity.CUDA) as profiler:
        work()
    cpu = torch.autograd.DeviceType.CPU
    rows = [
        event
        for event in profiler.key_averages()
        if event.self_device_time_total > 0 and event.device_type != cpu
    ]
    rows.sort(key=lambda event: -event.self_device_time_total)
    whole = sum(event.self_device_time_total for event in rows)
    launches = sum(event.count for event in rows)
    say(f"profile {label}: {whole / 1e3:.2f} ms, {launches} launches")
    for event in rows[:10]:
        took = event.self_device_time_total
        print(f"    {took / whole:6.1%} {took / 1e3:8.2f} ms x{event.count:<5} {event.key[:160]}")
    calls = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)[:6]
    spent = [f"{event.key[:40]} {event.self_cpu_time_total / 1e3:.2f} ms" for event in calls]
    print(f"    on the host: {', '.join(spent)}")
