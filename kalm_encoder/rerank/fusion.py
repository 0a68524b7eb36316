"""Fuses two rankings of the same candidates, as pure functions over plain numbers."""

from __future__ import annotations

from collections.abc import Mapping


def fuse(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Add the z-scores of two scores of each candidate.

    A z-score is (score - mean) / standard deviation over the candidates (of the population). Scales
    as different as BM25 and a reranker's margin then have the same weight.

    Args:
        first: Score by id; its ids are the candidates.
        second: Another score by id. A candidate that it lacks gets its lowest score; ids that are
            not candidates are ignored.

    Returns:
        The sum by id, in the order of `first`. Scores that are all equal add 0.

    Example: The first scores are a 2, b 2, c 0, d 0, with z-scores 1, 1, -1, -1. The second scores
    are a 5, b 1, c 5; d gets the lowest, 1, and the z-scores are 1, -1, 1, -1. The fused scores are
    a 2, b 0, c 0, d -2.
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
