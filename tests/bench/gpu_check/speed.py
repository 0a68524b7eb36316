"""Speed of the encoder against the device's own matrix products, and of the decoder.

`of rate` is 2 x non-embedding parameters x real tokens per second, over the measured rate of large
square products in the same dtype: padding, attention and everything else count as waste.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from kalm_encoder.model.cuda_graphs import round_up
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.encoder_forward import PackedForward
from kalm_encoder.model.layers import parts
from pipeline.estimate.flops import Dimensions
from tests.bench.forwards import RATIO, in_memory, ms_marco_lengths, plain_states, random_decoder
from tests.bench.gpu_check.device import CUDA, DEVICE, HALF, Setting, median_ms, say, seconds
from tests.bench.gpu_check.kernels import batches_of, kernel_seconds, random_pairs

GOALS = {"Nano": 0.37, "Small": 0.45, "Large": 0.5}
"""Least share of the rate of products, at 128 tokens per passage."""


def fresh_compiler() -> None:
    """Forget what was compiled: a process serves one model, and torch compiles only a few."""
    torch._dynamo.reset()
    parts.cache_clear()


def matmul_rate(n: int) -> float:
    """Return the operations per second of n x n products: the best of five, ten each."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=HALF) for _ in range(2))
    torch.matmul(a, b)
    times = [seconds(lambda: [torch.matmul(a, b) for _ in range(10)]) for _ in range(5)]
    return 10 * 2 * n**3 / min(times)


def measure_encoder(setting: Setting) -> list[str]:
    """Compare the encoder with the device's products, and with padding; plain and fused."""
    rate = matmul_rate(256 if setting.toy else 8192)
    say(f"matmul rate {rate / 1e12:.3g} TFLOP/s")
    bars = []
    for size in setting.sizes:
        model = setting.encoder(size)
        share = 2 * Dimensions.of(model.config).params / rate
        best = 0.0
        for fuse in (False, True)[: 1 if setting.toy else 2]:
            fresh_compiler()
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            encoder = PassageEncoder(in_memory(model, setting.tokenizer))
            loaded = time.perf_counter() - began
            encoder._forward = PackedForward(model, fuse=fuse)
            repeats = 1 if setting.toy else 2 if size == "Large" else 4
            total = repeats * encoder.token_budget
            kinds = {"128": [128] * (total // 128), "marco": ms_marco_lengths(total // 80)}
            for kind, lengths in kinds.items():
                line, speed = _encoder_line(encoder, lengths, repeats, fuse)
                attend = getattr(encoder._forward._attend, "__name__", "?")
                say(
                    f"encoder {size:5} {'fused' if fuse else 'plain'} {kind:5} budget "
                    f"{encoder.token_budget} attend {attend}: {speed:9,.0f} tokens/s, of rate "
                    f"{speed * share:.1%}, loaded in {loaded:.0f} s, {line}"
                )
                best = max(best, speed * share) if kind == "128" else best
            del encoder
        if size in GOALS:
            bars.append(f"bar gpu_{size.lower()} {best:.3g} >= {GOALS[size]:g}")
        del model
        if CUDA:
            torch.cuda.empty_cache()
    return bars


def _encoder_line(
    encoder: PassageEncoder, lengths: Sequence[int], repeats: int, compare: bool
) -> tuple[str, float]:
    """Return what else is known of encoding these passages, and real tokens per second."""
    batches = batches_of(encoder, lengths)

    def ours() -> None:
        started = [s for batch in batches for s in encoder.start(batch, ratio=RATIO)]
        for one in started:
            one.result()

    def padded() -> None:
        for batch in batches:
            plain_states(encoder.model, [t.ids for t in batch])

    warm_up = seconds(ours)
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if CUDA else "-"
    took = median_ms(ours, repeats, warm=1) / 1000
    host = busy = 0.0
    if CUDA:
        began = time.perf_counter()
        started = encoder.start(batches[0], ratio=RATIO)
        host = time.perf_counter() - began
        started[0].result()
        busy = kernel_seconds(ours) / took
    over = f"over padded {seconds(padded) / took:.2f}, " if compare or not CUDA else ""
    return (
        f"{over}busy {busy:.0%}, host {host * 1e3:.0f} ms per "
        f"batch, warm-up {warm_up:.0f} s, peak {peak}"
    ), sum(lengths) / took


def measure_decoder(setting: Setting) -> list[str]:
    """Time 1, 10 and 100 candidates: as on a CPU, with fused parts, and as CUDA graphs."""
    for size, dimensions in setting.sizes.items():
        fresh_compiler()
        model = random_decoder(dimensions, setting.tokenizer, DEVICE, HALF)
        decoder = QueryDecoder(in_memory(model, setting.tokenizer))
        graphs, usual = decoder.graphs, seconds(decoder.warm_up)
        recorded = len(graphs._recorded) if graphs else 0
        memory = f", {torch.cuda.memory_allocated() / 2**30:.1f} GiB" if CUDA else ""
        say(f"decoder {size:5} warm-up {usual:.1f} s, {recorded} graphs{memory}")
        for count in (1, 10, 100, 1000)[: 2 if setting.toy else 4]:
            pairs = random_pairs(decoder, count)
            length = len(pairs[0].prompt.ids)
            found, scores = {}, {}
            for label, on_gpu, used in (
                ("plain", False, None),
                ("fused", CUDA, None),
                ("graphs", CUDA, graphs),
            )[: 3 if CUDA else 1]:
                decoder._on_gpu, decoder.graphs = on_gpu, used
                found[label] = median_ms(partial(decoder.score_pairs, pairs), repeats=10)
                scores[label] = np.array([score for score, _ in decoder.score_pairs(pairs)])
            text = ", ".join(f"{label} {took:.2f} ms" for label, took in found.items())
            states = max(pair.num_states for pair in pairs)
            if graphs and (shape := round_up(count, length, states)):
                replayed = median_ms(graphs._recorded[shape].graph.replay)
                text += f", replay alone {replayed:.2f} ms"
            off = max(abs(some - scores["plain"]).max() for some in scores.values())
            say(
                f"decoder {size:5} {count:4} candidates, prompt {length}: {text}; "
                f"{1000 * count / min(found.values()):,.0f} pairs/s, max |dP| {off:.4f}"
            )
        del decoder, graphs, model
        if CUDA:
            torch.cuda.empty_cache()
    return []
