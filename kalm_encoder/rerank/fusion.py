"""Two rankings of the same candidates made one. Pure functions over plain numbers."""

from __future__ import annotations

from collections.abc import Mapping


def fuse(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Add two scores of each candidate after standardising each over the candidates.

    A z-score is (score - mean) / standard deviation (of the population); scales as different as
    BM25 and a reranker's margin then weigh the same.

    Args:
        first: score by id; its ids are the candidates.
        second: another score by id; a candidate it lacks gets its lowest, others are ignored.

    Returns:
        The sum by id, in the order of `first`. A list whose values are all equal adds 0.

    Example: first a 2, b 2, c 0, d 0 has z-scores 1, 1, -1, -1; second a 5, b 1, c 5 gives d the
    lowest, 1, and has 1, -1, 1, -1; fused a 2, b 0, c 0, d -2.
    """
    present = {i: second[i] for i in first if i in second}
    lowest = min(present.values(), default=0.0)
    ones = _standardise(first)
    others = _standardise({i: present.get(i, lowest) for i in first})
    return {i: ones[i] + others[i] for i in first}


def _standardise(scores: Mapping[str, float]) -> dict[str, float]:
    values = list(scores.values())
    if not values or min(values) == max(values):
        return dict.fromkeys(scores, 0.0)
    mean = sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
    return {i: (v - mean) / deviation for i, v in scores.items()}
