"""Measures how fast the real encoder is on this machine, on passages of the corpus at hand."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kalm_encoder.model.encoder import PassageEncoder
from pipeline.corpus.passages import Passage
from pipeline.estimate.intervals import Estimate
from pipeline.workers.device_threads import DeviceThreads

MIN_RUNS = 3
BATCHES_PER_THREAD = 4
"""Full batches that each device thread gets in a run, so that starting and ending weigh little."""
RATIO = 4


@dataclass(frozen=True)
class Rate:
    """Tokens per second of one device.

    Attributes:
        tokens_per_s: Real tokens per second; the median of the measured runs.
        low, high: Slowest and fastest run; equal to `tokens_per_s` if a user entered it.
        runs: Number of measured runs; 0 if a user entered the rate.
        device: Type of the device.
    """

    tokens_per_s: float
    low: float
    high: float
    runs: int = 0
    device: str = "entered"

    def hours(self, tokens: Estimate, gpus: int) -> Estimate:
        """Return the hours that `gpus` devices take; both the tokens and the rate may err."""
        per_hour = 3600.0 * gpus
        return Estimate(
            tokens.value / (self.tokens_per_s * per_hour),
            tokens.low / (self.high * per_hour),
            tokens.high / (self.low * per_hour),
        )


def measure_rate(
    encoder: PassageEncoder, examples: Sequence[tuple[Passage, int]], seconds: float
) -> Rate:
    """Time the encoding of passages: tokenise, forward and pool, as a worker does.

    Args:
        encoder: Encoder on the device to time.
        examples: Passages and their tokens, used again from the first one when they run out.
        seconds: Time to spend; MIN_RUNS are made in any case, after one that is not counted.
    """
    threads = DeviceThreads(encoder.device)
    run_tokens = BATCHES_PER_THREAD * threads.count * encoder.token_budget
    share = run_tokens / sum(min(tokens, encoder.max_length) for _, tokens in examples)
    size = math.ceil(share * len(examples))
    texts = itertools.cycle(passage.text for passage, _ in examples)

    def run() -> float:
        began = time.monotonic()
        tokens = encoder.tokenise(list(itertools.islice(texts, size)))
        threads.map(partial(encoder.encode_batch, ratio=RATIO), encoder.batches(tokens))
        return sum(len(t.ids) for t in tokens) / (time.monotonic() - began)

    run()
    rates: list[float] = []
    end = time.monotonic() + seconds
    while len(rates) < MIN_RUNS or time.monotonic() < end:
        rates.append(run())
    threads.stop()
    return Rate(statistics.median(rates), min(rates), max(rates), len(rates), encoder.device.type)
