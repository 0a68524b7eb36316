"""How sure a mean over queries is: bootstrap intervals and paired randomisation tests.

Pure functions over numbers, seeded: the same values give the same interval and the same p. Nothing
here knows metrics or settings. A sample of queries says something of queries like them, and nothing
of other collections.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation.results import Difference
from kalm_encoder.errors import InputError

DRAWS = 1 << 22
"""Random numbers held at a time, so that memory does not grow with queries times resamples."""


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean.

    Args:
        values: (n,) one a query, n >= 1. One value alone gives an interval of no width.
        seed: of the resampling.
        resamples: draws of n values with replacement.

    Raises:
        InputError: no values.
    """
    array = _checked(values)
    rng = np.random.default_rng(seed)
    means = [
        array[rng.integers(0, len(array), (rows, len(array)))].mean(axis=1)
        for rows in _blocks(resamples, len(array))
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def randomisation_p(
    differences: Sequence[float] | NDArray[np.float64],
    *,
    seed: int = 0,
    permutations: int = 10_000,
) -> float:
    """Return the two-sided p of a paired randomisation test: signs flipped at random.

    Were the two settings alike, each query's difference might as well have the other sign. p is the
    share of sign patterns whose mean is at least as far from 0 as the one seen, (count + 1) /
    (permutations + 1), so it is never below 1 / (permutations + 1).

    Args:
        differences: (n,) setting minus first setting, one a query, n >= 1.
        seed: of the flips.
        permutations: sign patterns drawn.

    Raises:
        InputError: no differences.

    Example: ten differences of 1 are matched by 2 of the 1,024 patterns: p is about .002.
    """
    array = _checked(differences)
    array = array[array != 0]  # whatever their sign, they change no mean
    rng = np.random.default_rng(seed)
    total = array.sum()
    bound = abs(total) - 1e-9 * np.abs(array).sum()  # sums in another order differ by rounding
    count = 0
    for rows in _blocks(permutations, len(array)):
        kept = rng.integers(0, 2, (rows, len(array)), dtype=np.int8)
        count += int(np.count_nonzero(np.abs(2 * (kept @ array) - total) >= bound))
    return (count + 1) / (permutations + 1)


def compare(first: Mapping[str, float], other: Mapping[str, float]) -> Difference:
    """Compare two settings' values of one metric, paired by query.

    Args:
        first: value by query id of the setting that is compared with.
        other: the same of the setting in question.

    Raises:
        InputError: not the same queries, or none.
    """
    if first.keys() != other.keys():
        odd = sorted(first.keys() ^ other.keys())
        raise InputError(
            f"query {odd[0]!r} and {len(odd) - 1} others have a value in one setting only. "
            "Measure both on the same queries; one without results counts 0."
        )
    differences = np.array([other[query] - first[query] for query in first], dtype=np.float64)
    low, high = bootstrap_interval(differences)
    return Difference(
        mean=float(differences.mean()),
        low=low,
        high=high,
        p=randomisation_p(differences),
        wins=int(np.count_nonzero(differences > 0)),
        losses=int(np.count_nonzero(differences < 0)),
    )


def _checked(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise InputError("no values to average. Are there judgements for any of the queries?")
    return array


def _blocks(rows: int, width: int) -> Iterator[int]:
    """Yield row counts that sum to `rows`, none with more than DRAWS numbers of `width` a row."""
    block = max(1, DRAWS // max(1, width))
    for start in range(0, rows, block):
        yield min(block, rows - start)
