"""Whether P(yes) means what it says: of the candidates scored about .8, are 80 % relevant?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jobs.evaluation.results import ScoreSample
from kalm_encoder.errors import InputError

BINS = 20


def score_sample(setting: str, scores: Sequence[float], relevant: Sequence[bool]) -> ScoreSample:
    """Sort the scored candidates of all queries into bins of P(yes).

    A candidate that nobody judged counts as not relevant, so that an incompletely judged collection
    makes a good model look overconfident.

    Args:
        setting: name of the setting that scored them.
        scores: (n,) P(yes) of each candidate, in [0, 1].
        relevant: (n,) whether it is judged relevant.

    Raises:
        InputError: none, not as many judgements as scores, or a score that is no probability.

    Example: scores .9 and .9 of one relevant and one other candidate share a bin; its mean score is
    .9, its share of relevant ones .5, and the expected calibration error .4.
    """
    p, judged = np.asarray(scores, dtype=np.float64), np.asarray(relevant, dtype=bool)
    if not len(p) or len(p) != len(judged):
        raise InputError(
            f"setting {setting!r}: {len(p)} scores with {len(judged)} judgements. "
            "Give one of each for every scored candidate, and at least one."
        )
    if not ((p >= 0) & (p <= 1)).all():
        worst = p[~((p >= 0) & (p <= 1))][0]
        raise InputError(f"setting {setting!r}: score {worst} is no probability. Give P(yes).")
    edges = np.arange(BINS + 1) / BINS
    bins = np.minimum(np.searchsorted(edges, p, side="right") - 1, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    hits = np.bincount(bins, weights=judged, minlength=BINS).astype(np.int64)
    sums = np.bincount(bins, weights=p, minlength=BINS)
    filled = np.flatnonzero(counts)
    return ScoreSample(
        setting=setting,
        edges=edges.tolist(),
        relevant=hits.tolist(),
        other=(counts - hits).tolist(),
        calibration=[
            (float(sums[i] / counts[i]), float(hits[i] / counts[i]), int(counts[i])) for i in filled
        ],
        expected_calibration_error=float(np.abs(sums - hits).sum() / len(p)),
    )
