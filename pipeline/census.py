"""Questions to a sample: totals, length percentiles and padding of the whole corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kalm_encoder.batching import padded_size, plan_batches
from kalm_encoder.encoder import MAX_PADDING
from pipeline.estimate import Estimate, Part, mean, quantiles, total
from pipeline.sample import Block, Sample

SHARES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}


class Census:
    """Totals over a corpus, or over `passages` more like it."""

    def __init__(self, sample: Sample, passages: int | None) -> None:
        self._strata, self._passages = sample.strata, passages

    def of(self, count: Callable[[Block], float], *, a_line: bool = False) -> Estimate:
        """Estimate the sum of `count` over all blocks.

        Args:
            count: of one block.
            a_line: whether it goes with the number of lines rather than with bytes.
        """
        parts = self._parts(count, a_line)
        if self._passages is None:
            return total(parts)
        below = self._parts(lambda b: len(b.lengths), a_line)
        return mean(parts, below).times(self._passages)

    def _parts(self, count: Callable[[Block], float], a_line: bool) -> list[Part]:
        parts = []
        for stratum in self._strata:
            lines = a_line and stratum.lines is not None
            x = [float(b.lines) if lines else b.size for b in stratum.blocks]
            y = [float(count(b)) for b in stratum.blocks]
            size = float(stratum.lines or 0) if lines else stratum.size
            if stratum.complete:
                size = sum(x)
            parts.append(Part(np.array(y), np.array(x), size, stratum.complete))
        return parts


def percentiles(sample: Sample) -> dict[str, int]:
    """Return the uncut lengths, in tokens, by the names in SHARES, and "max", the longest seen."""
    strata = [s for s in sample.strata if any(len(b.lengths) for b in s.blocks)]
    values = [np.concatenate([b.lengths for b in s.blocks]) for s in strata]
    weights = [s.size / sum(b.size for b in s.blocks) for s in strata]
    found = dict(zip(SHARES, quantiles(values, weights, list(SHARES.values())), strict=True))
    return {**found, "max": int(max(v.max() for v in values))}


def padding(sample: Sample, max_length: int, shard_size: int, token_budget: int) -> float:
    """Return the share of padding when blocks in the corpus's order are cut into shards.

    Exact where all of the corpus was read; else neighbouring shards stand for those between.
    """
    files: dict[int, list[Block]] = {}
    for block in sample.blocks:
        files.setdefault(block.file if sample.complete else 0, []).append(block)
    real = padded = 0
    for blocks in files.values():
        lengths = np.concatenate([np.minimum(b.lengths, max_length) for b in blocks]).tolist()
        for start in range(0, len(lengths), shard_size):
            shard = lengths[start : start + shard_size]
            real += sum(shard)
            batches = plan_batches(shard, token_budget, max_padding=MAX_PADDING)
            padded += padded_size(shard, batches)
    return 1 - real / padded
