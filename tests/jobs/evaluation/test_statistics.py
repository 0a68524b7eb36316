import numpy as np
import pytest
from scipy import stats

from jobs.evaluation.statistics import bootstrap_interval, compare, randomisation_p
from kalm_encoder.errors import InputError


def test_the_interval_is_that_of_scipy():
    values = np.random.default_rng(5).beta(0.6, 0.8, 120)
    other = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap_interval(values) == pytest.approx((other.low, other.high), abs=0.003)


def test_intervals_hold_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(11)
    held = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.exponential(1.0, 80), resamples=500)
        held += low <= 1.0 <= high
    assert 176 <= held <= 198


def test_p_equals_the_share_of_all_sign_patterns():
    differences = np.array([0.3, -0.1, 0.25, 0.0, 0.5, -0.05, 0.1, 0.2, 0.0, 0.15])
    patterns = np.array(np.meshgrid(*[[-1, 1]] * len(differences))).reshape(len(differences), -1)
    means = np.abs(differences @ patterns)
    exact = np.mean(means >= abs(differences.sum()) - 1e-12)
    assert randomisation_p(differences, permutations=50_000) == pytest.approx(exact, abs=0.005)


def test_p_agrees_with_scipys_permutation_test_on_many_queries():
    differences = np.random.default_rng(2).normal(0.02, 0.15, 150)
    other = stats.permutation_test(
        (differences,),
        lambda d, axis: d.mean(axis=axis),
        permutation_type="samples",
        n_resamples=20_000,
        vectorized=True,
        rng=np.random.default_rng(3),
    )
    assert randomisation_p(differences) == pytest.approx(other.pvalue, abs=0.015)


def test_no_difference_at_all_is_p_1_and_a_large_one_is_never_p_0():
    assert randomisation_p(np.zeros(30)) == 1.0
    assert randomisation_p(np.ones(60)) == 1 / 10_001


def test_a_comparison_counts_wins_losses_and_pairs_by_query():
    first = {"q1": 0.5, "q2": 0.2, "q3": 1.0, "q4": 0.0}
    other = {"q4": 0.0, "q3": 0.75, "q2": 0.7, "q1": 1.0}
    found = compare(first, other)
    assert (found.wins, found.losses) == (2, 1)
    assert found.mean == pytest.approx(0.1875)
    assert found.low <= found.mean <= found.high
    assert found == compare(first, other)  # seeded


def test_exchanging_the_settings_turns_the_sign_only():
    rng = np.random.default_rng(8)
    a = {str(i): float(v) for i, v in enumerate(rng.random(40))}
    b = {str(i): float(v) for i, v in enumerate(rng.random(40))}
    there, back = compare(a, b), compare(b, a)
    assert there.mean == pytest.approx(-back.mean)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.01)
    assert there.p == back.p


def test_other_queries_and_no_queries_are_refused():
    with pytest.raises(InputError, match="query 'q2' and 0 others"):
        compare({"q1": 0.5}, {"q1": 0.5, "q2": 0.1})
    with pytest.raises(InputError, match="no values"):
        compare({}, {})


def test_many_queries_are_drawn_in_blocks_and_give_the_normal_interval():
    values = np.random.default_rng(4).random(10_000)
    low, high = bootstrap_interval(values, resamples=1_000)
    half = 1.96 * values.std() / 100
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.001)
