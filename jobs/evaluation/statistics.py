"""Says how sure a mean over queries is, and whether P(yes) is a probability.

Pure functions over numbers, seeded: the same values give the same interval and the same p. Nothing
here knows metrics or settings. A sample of queries says something of queries like them, and nothing
of other collections.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from jobs.evaluation.results import Difference, ScoreSample
from kalm_encoder.errors import InputError

BINS = 20
"""Number of bins of P(yes), all of one width."""
BATCH_NUMBERS = 1 << 22
"""Random numbers held at a time, so that memory does not grow with queries times resamples."""


def bootstrap_interval(
    values: Sequence[float] | NDArray[np.float64], *, seed: int = 0, resamples: int = 10_000
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean.

    Args:
        values: (n,) one value per query, n >= 1. One value alone gives an interval of no width.
        seed: Seed of the resampling.
        resamples: How often n values are drawn with replacement.

    Raises:
        InputError: There are no values.
    """
    array = _checked(values)
    if len(array) == 1:
        return float(array[0]), float(array[0])
    found = stats.bootstrap(
        (array,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, BATCH_NUMBERS // len(array)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def randomisation_p(
    differences: Sequence[float] | NDArray[np.float64], *, seed: int = 0, permutations: int = 10_000
) -> float:
    """Return the two-sided p of a paired randomisation test: signs flipped at random.

    Were the two settings alike, each query's difference might as well have the other sign. p is the
    share of sign patterns whose mean is at least as far from 0 as the one seen. All patterns are
    counted where there are no more than `permutations`; else as many are drawn, and p is
    (count + 1) / (permutations + 1), never 0.

    Args:
        differences: (n,) setting minus first setting per query, n >= 1.
        seed: Seed of the flips.
        permutations: Largest number of sign patterns.

    Raises:
        InputError: There are no differences.

    Example: ten differences of 1 are matched by 2 of the 1,024 patterns: p is about .002.
    """
    array = _checked(differences)
    array = array[array != 0]  # whatever their sign, they change no mean
    if len(array) < 2:
        return 1.0  # with either sign, one difference is as far from 0
    test = stats.permutation_test(
        (array,),
        lambda flipped, axis: np.abs(flipped.sum(axis=axis)),
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=permutations,
        batch=max(1, BATCH_NUMBERS // len(array)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def compare(first: Mapping[str, float], other: Mapping[str, float]) -> Difference:
    """Compare two settings' values of one metric, paired by query.

    Args:
        first: Value by query id of the setting that is compared with.
        other: Value by query id of the setting in question.

    Raises:
        InputError: The queries are not the same, or there are none.
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


def score_sample(setting: str, scores: Sequence[float], relevant: Sequence[bool]) -> ScoreSample:
    """Sort the scored candidates of all queries into bins of P(yes).

    Of the candidates scored about .8, are 80 % relevant? A candidate that nobody judged counts as
    not relevant, so an incompletely judged collection makes a good model look overconfident.

    Args:
        setting: Name of the setting that scored them.
        scores: (n,) P(yes) of each candidate, in [0, 1].
        relevant: (n,) whether each candidate is judged relevant.

    Raises:
        InputError: There are no scores, there are more or fewer judgements than scores, or a score
            is no probability.

    Example: scores .9 and .9 of one relevant and one other candidate share a bin; its mean score is
    .9, its share of relevant ones .5, and the expected calibration error .4.
    """
    p, judged = np.asarray(scores, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if not len(p) or len(p) != len(judged):
        raise InputError(
            f"setting {setting!r}: {len(p)} scores with {len(judged)} judgements. "
            "Give one of each for every scored candidate, and at least one."
        )
    if len(wrong := p[~((p >= 0) & (p <= 1))]):
        raise InputError(f"setting {setting!r}: score {wrong[0]} is no probability. Give P(yes).")
    edges = np.arange(BINS + 1) / BINS
    counts, hits = (np.histogram(some, edges)[0] for some in (p, p[judged]))
    sums = np.histogram(p, edges, weights=p)[0]
    bins = zip(sums.tolist(), hits.tolist(), counts.tolist(), strict=True)
    return ScoreSample(
        setting=setting,
        edges=edges.tolist(),
        relevant=hits.tolist(),
        other=(counts - hits).tolist(),
        calibration=[(total / n, found / n, n) for total, found, n in bins if n],
        expected_calibration_error=float(np.abs(sums - hits).sum() / len(p)),
    )


def _checked(values: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise InputError("no values to average. Are there judgements for any of the queries?")
    return array
