"""How fast the real encoder is on this machine, on passages of the corpus at hand."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from kalm_encoder.model.encoder import PassageEncoder
from pipeline.workers.device_threads import DeviceThreads

LEAST_RUNS = 3
RATIO = 4


@dataclass(frozen=True)
class Rate:
    """Tokens a second of one device.

    Attributes:
        tokens_per_s: real tokens; of the measured runs the median.
        low, high: slowest and fastest run; the same as `tokens_per_s` where a user entered it.
        runs: measured; 0 where entered.
        device: where.
    """

    tokens_per_s: float
    low: float
    high: float
    runs: int = 0
    device: str = "entered"


def measure_rate(encoder: PassageEncoder, texts: Sequence[str], seconds: float) -> Rate:
    """Time runs of about four full batches a lane each: tokenise, forward, pool.

    Args:
        encoder: loaded, on the device to time.
        texts: passages, used in turn, from the first again where they run out.
        seconds: to spend; three runs are made in any case, after one that is not counted.
    """
    lanes = DeviceThreads(encoder.device)
    groups = _groups(encoder, texts, 4 * lanes.count * encoder.token_budget)
    _encode(encoder, lanes, groups[0])
    rates: list[float] = []
    end = time.monotonic() + seconds
    while len(rates) < LEAST_RUNS or time.monotonic() < end:
        began = time.monotonic()
        tokens = _encode(encoder, lanes, groups[len(rates) % len(groups)])
        rates.append(tokens / (time.monotonic() - began))
    lanes.stop()
    return Rate(statistics.median(rates), min(rates), max(rates), len(rates), encoder.device.type)


def _encode(encoder: PassageEncoder, lanes: DeviceThreads, texts: Sequence[str]) -> int:
    """Encode texts as a worker does, but keep nothing; return their tokens."""
    tokens = encoder.tokenise(texts)
    lengths = [len(t.ids) for t in tokens]
    batches = [[tokens[i] for i in batch] for batch in encoder.batches(lengths)]
    lanes.map(partial(encoder.encode_batch, ratio=RATIO), batches)
    return sum(lengths)


def _groups(encoder: PassageEncoder, texts: Sequence[str], size: int) -> list[list[str]]:
    """Cut texts into runs of about so many tokens."""
    groups: list[list[str]] = [[]]
    tokens = 0
    for text, counted in zip(texts, encoder.tokenise(texts), strict=True):
        if tokens >= size:
            groups.append([])
            tokens = 0
        groups[-1].append(text)
        tokens += len(counted.ids)
    return groups[:-1] or groups  # the last one may be nearly empty
