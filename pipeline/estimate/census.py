"""Questions to a sample: totals and length percentiles of the whole corpus."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pipeline.estimate.intervals import Estimate, Part, mean, quantiles, total
from pipeline.estimate.sample import Block, Sample

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
