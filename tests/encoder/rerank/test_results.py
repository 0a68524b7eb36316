"""Where results belong in the list of a caller, and the scores that a framework sorts by."""

from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.rerank.results import RerankResult, at_places, falling_scores


def results(*scored):
    return [RerankResult(id, score, score, ratio) for id, score, ratio in scored]


def test_results_are_placed_wherever_their_id_is_and_ties_come_by_position():
    tied = results(("a", 0.5, 4), ("b", 0.5, 4), ("c", 0.2, 4))
    ids = ["c", "a", "b", "a", "c"]
    assert [(place, r.id) for place, r in at_places(tied, ids)] == [
        (1, "a"), (2, "b"), (3, "a"), (0, "c"), (4, "c"),
    ]  # fmt: skip
    assert [place for place, _ in at_places(results(("7", 0.1, 4)), ["7", 7, "7"])] == [0, 1, 2]


def test_the_example_of_falling_scores():
    staged = results(("a", 0.8, 4), ("b", 0.3, 4), ("c", 0.5, 32), ("d", 0.1, 32))
    assert falling_scores(staged) == [0.8, 0.3, 0.3, 0.1]


@given(st.lists(st.floats(0, 1)))
def test_sorting_by_falling_scores_keeps_the_order(scores):
    staged = results(*((str(n), score, 4) for n, score in enumerate(scores)))
    fallen = falling_scores(staged)
    assert fallen == sorted(fallen, reverse=True)
    assert all(shown <= score for shown, score in zip(fallen, scores, strict=True))
    one_stage = results(*((str(n), s, 4) for n, s in enumerate(sorted(scores, reverse=True))))
    assert falling_scores(one_stage) == [r.score for r in one_stage]
