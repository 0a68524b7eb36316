"""What two rankings make together."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.rerank.fusion import fuse

SCORES = st.dictionaries(
    st.sampled_from("abcdefgh"), st.integers(-1000, 1000).map(lambda n: n / 8), min_size=1
)


def test_the_worked_example():
    fused = fuse({"a": 2, "b": 2, "c": 0, "d": 0}, {"a": 5, "b": 1, "c": 5})
    assert fused == {"a": 2, "b": 0, "c": 0, "d": -2}
    assert list(fused) == ["a", "b", "c", "d"]


def test_equal_or_absent_scores_add_nothing():
    first = {"a": 3.0, "b": 1.0}
    assert fuse(first, {"a": 7.0, "b": 7.0}) == fuse(first, {}) == {"a": 1.0, "b": -1.0}
    assert fuse({"a": 1.0, "b": 1.0}, {"a": 0.0, "b": 0.0}) == {"a": 0.0, "b": 0.0}
    assert fuse({}, {"a": 1.0}) == {}


@given(SCORES, SCORES, st.integers(1, 50), st.integers(-50, 50))
def test_scale_and_shift_of_a_list_do_not_matter(first, second, scale, shift):
    moved = {i: scale * score + shift for i, score in second.items()}
    for one, two in zip(fuse(first, second).values(), fuse(first, moved).values(), strict=True):
        assert one == pytest.approx(two, abs=1e-6)


@given(SCORES, SCORES)
def test_only_candidates_are_fused_and_the_sums_centre_on_zero(first, second):
    fused = fuse(first, second)
    assert fused.keys() == first.keys()
    assert math.isclose(sum(fused.values()), 0, abs_tol=1e-6)
