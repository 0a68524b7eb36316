import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve

from jobs.evaluation.statistics import score_sample
from kalm_encoder.errors import InputError


def test_worked_example():
    sample = score_sample("r4", [0.9, 0.9], [True, False])
    assert sample.relevant[18] == sample.other[18] == 1
    assert sum(sample.relevant) == sum(sample.other) == 1
    assert sample.calibration == [(0.9, 0.5, 2)]
    assert sample.expected_calibration_error == pytest.approx(0.4)


def test_the_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(1)
    scores = rng.random(3_000)
    relevant = rng.random(3_000) < scores**2
    share, mean = calibration_curve(relevant, scores, n_bins=20)
    sample = score_sample("r4", scores.tolist(), relevant.tolist())
    assert [c[0] for c in sample.calibration] == pytest.approx(mean.tolist())
    assert [c[1] for c in sample.calibration] == pytest.approx(share.tolist())
    # E|p - p²| of a uniform p is 1/6
    assert sample.expected_calibration_error == pytest.approx(1 / 6, abs=0.02)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=200))
def test_every_candidate_is_in_one_bin(pairs):
    scores, relevant = [p for p, _ in pairs], [r for _, r in pairs]
    sample = score_sample("r4", scores, relevant)
    assert sum(sample.relevant) == sum(relevant)
    assert sum(sample.relevant) + sum(sample.other) == len(pairs)
    assert sum(n for _, _, n in sample.calibration) == len(pairs)
    assert 0 <= sample.expected_calibration_error <= 1


def test_bin_edges_belong_to_the_bin_above_and_1_to_the_last():
    sample = score_sample("r4", [0.0, 0.15, 1.0], [False, False, True])
    assert [i for i, n in enumerate(sample.other) if n] == [0, 3]
    assert sample.relevant[19] == 1
    assert (len(sample.edges), sample.edges[3], sample.edges[20]) == (21, 0.15, 1.0)


@pytest.mark.parametrize(
    ("scores", "relevant", "message"),
    [
        ([], [], "0 scores with 0 judgements"),
        ([0.5], [True, False], "1 scores with 2 judgements"),
        ([0.5, 1.5], [True, False], "score 1.5 is no probability"),
        ([float("nan")], [True], "score nan is no probability"),
    ],
)
def test_what_is_no_sample_of_probabilities_is_refused(scores, relevant, message):
    with pytest.raises(InputError, match=f"setting 'r4': {message}"):
        score_sample("r4", scores, relevant)
