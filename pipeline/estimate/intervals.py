"""Turns the blocks of a sample into the total of a corpus, with a 95 % interval.

Blocks are clusters: the passages of one block resemble each other. Therefore the spread between
blocks, not the spread between passages, says how far off a total may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from kalm_encoder.errors import InputError


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its 95 % interval; all three are equal if the number is exact."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> Estimate:
        """Return the estimate in another unit."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def plus(self, other: Estimate) -> Estimate:
        """Return the sum; its interval is as wide as if both numbers erred together."""
        return Estimate(self.value + other.value, self.low + other.low, self.high + other.high)


def ratio_estimate(
    y: NDArray[np.float64], x: NDArray[np.float64], size: float, covered: float
) -> Estimate:
    """Estimate the total of a quantity y in a population of known size: size * sum(y) / sum(x).

    The variance is that of the ratio estimator (Cochran, Sampling Techniques, 6.4):
    (size / sum x)² n / (n - 1) sum (y - R x)² (1 - covered), with R = sum(y) / sum(x).

    Args:
        y: (blocks,) the quantity in each block.
        x: (blocks,) the size of each block.
        size: Size of the population in the unit of x.
        covered: Share of the population that was read. It is 0 if the population is other passages
            than those that were read.

    Raises:
        InputError: There are fewer than two blocks.

    Example: blocks y = 2, 4 at x = 1, 1 of a population of size 4 give 12: R = 3, 3 * 4.
    """
    n = len(y)
    if n < 2:
        raise InputError(
            f"{n} blocks are too few for an interval: give more of the corpus or raise --time-limit"
        )
    scale = size / x.sum()
    spread = ((y - y.sum() / x.sum() * x) ** 2).sum()
    variance = scale**2 * n / (n - 1) * spread * max(0.0, 1 - covered)
    value, half = float(y.sum() * scale), float(stats.t.ppf(0.975, n - 1) * variance**0.5)
    least = float(y.sum()) if covered else 0.0  # what was read is part of the population
    return Estimate(value, max(least, value - half), value + half)
