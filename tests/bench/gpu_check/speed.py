"""Speed of the encoder against the device's own matrix products, and of the decoder.

`of rate` is 2 x non-embedding parameters x real tokens per second, over the measured rate of large
square products in the same dtype: padding, attention and everything else count as waste.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from kalm_encoder.model import decoder as decoder_module
from kalm_encoder.model.decoder import QueryDecoder
from kalm_encoder.model.encoder import PassageEncoder
from kalm_encoder.model.pairs import Pair
from pipeline.estimate.flops import Dimensions
from tests.bench.forwards import RATIO, in_memory, ms_marco_lengths, plain_states, random_decoder
from tests.bench.gpu_check.device import CUDA, DEVICE, HALF, Setting, median_ms, say, seconds
from tests.bench.gpu_check.kernels import batches_of, kernel_seconds

GOALS = {"Nano": 0.35, "Large": 0.5}
"""Least share of the rate of products, at 128 tokens per passage."""


def matmul_rate(n: int) -> float:
    """Return the operations per second of n x n products: the best of five, ten each."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=HALF) for _ in range(2))
    torch.matmul(a, b)
    times = [seconds(lambda: [torch.matmul(a, b) for _ in range(10)]) for _ in range(5)]
    return 10 * 2 * n**3 / min(times)


def measure_encoder(setting: Setting) -> list[str]:
    """Compare the encoder with the device's products, and with padding; eager and compiled."""
    rate = matmul_rate(256 if setting.toy else 8192)
    say(f"matmul rate {rate / 1e12:.3g} TFLOP/s")
    bars = []
    for size in setting.sizes:
        model = setting.encoder(size)
        share = 2 * Dimensions.of(model.config).params / rate
        best = 0.0
        for variant in ("eager", "compiled")[: 1 if setting.toy else 2]:
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            files = in_memory(model, setting.tokenizer)
            encoder = PassageEncoder(files, compile=variant == "compiled")
            total = (2 if size == "Large" else 4) * encoder.token_budget
            kinds = {"128": [128] * (total // 128), "marco": ms_marco_lengths(total // 80)}
            for kind, lengths in kinds.items():
                line, speed = _encoder_line(encoder, lengths, 2 if size == "Large" else 4)
                attend = getattr(encoder._forward._attend, "__name__", "?")
                say(
                    f"encoder {size:5} {variant:8} {kind:5} budget {encoder.token_budget} attend "
                    f"{attend}: {speed:9,.0f} tokens/s, of rate {speed * share:.1%}, {line}"
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
    encoder: PassageEncoder, lengths: Sequence[int], repeats: int
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
    return (
        f"over padded {seconds(padded) / took:.2f}, busy {busy:.0%}, host {host * 1e3:.0f} ms per "
        f"batch, warm-up {warm_up:.0f} s, peak {peak}"
    ), sum(lengths) / took


def measure_decoder(setting: Setting) -> list[str]:
    """Time 1, 10 and 100 candidates: padding held to 5 % or not, and CUDA graphs of Nano."""
    for size, dimensions in setting.sizes.items():
        model = random_decoder(dimensions, setting.tokenizer, DEVICE, HALF)
        rng = np.random.default_rng(0)
        plain = QueryDecoder(in_memory(model, setting.tokenizer))
        prompt = plain.prompt("how many people live in the capital of the country")
        for count in (1, 10, 100):
            pairs = [
                Pair(prompt, rng.standard_normal((-(-n // RATIO), dimensions.hidden)).astype("f2"))
                for n in ms_marco_lengths(count)
            ]
            padding, found = decoder_module.MAX_PADDING, {}
            for label, most in (("5% padding", padding), ("any padding", 1.0)):
                decoder_module.MAX_PADDING = most
                found[label] = median_ms(partial(plain.score_pairs, pairs), repeats=5)
            decoder_module.MAX_PADDING = padding
            text = ", ".join(f"{k} {v:.1f} ms" for k, v in found.items())
            if CUDA and size == "Nano":
                text += _graphs(model, setting.tokenizer, pairs, plain.score_pairs(pairs))
            speed = 1000 * count / min(found.values())
            say(
                f"decoder {size:5} {count:3} candidates, prompt {len(prompt.ids)}: {text}; "
                f"eager {speed:,.0f} pairs/s"
            )
    return []


def _graphs(
    model: Any, tokenizer: Any, pairs: Sequence[Pair], right: Sequence[tuple[float, float]]
) -> str:
    """Say how fast CUDA graphs are, how long they take to record, and how far off they are."""
    compiled = QueryDecoder(in_memory(model, tokenizer), compile=True)
    try:
        # They compile, warm up, record and replay.
        lags = [seconds(lambda: compiled.score_pairs(pairs)) for _ in range(4)]
        took = median_ms(lambda: compiled.score_pairs(pairs), repeats=5)
        got = compiled.score_pairs(pairs)
    except Exception as error:  # what fails here must not cost the other figures
        return f", graphs failed: {type(error).__name__}: {str(error)[:200]}"
    off = max(abs(a[0] - b[0]) for a, b in zip(got, right, strict=True))
    calls = ", ".join(f"{s:.2f} s" for s in lags)
    return f", graphs {took:.1f} ms (calls 1-4: {calls}; max |dP| {off:.3f})"
