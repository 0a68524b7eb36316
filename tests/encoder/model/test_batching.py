from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.model.batching import make_batches, make_packed_batches


@given(
    lengths=st.lists(st.integers(1, 1024), max_size=200),
    budget=st.integers(1, 8192),
    overhead=st.integers(0, 100),
)
def test_every_item_once_and_within_budget(lengths, budget, overhead):
    batches = make_batches(lengths, budget, overhead=overhead)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * (longest + overhead) <= budget


def test_worked_example():
    assert make_batches([3, 9, 8], 18) == [[1, 2], [0]]


@given(lengths=st.lists(st.integers(1, 1024), max_size=300), budget=st.integers(1, 8192))
def test_packed_batches_hold_every_item_in_order_and_are_of_like_size(lengths, budget):
    batches = make_packed_batches(lengths, budget)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    assert all(
        len(batch) == 1 or size <= budget for batch, size in zip(batches, sizes, strict=True)
    )
    longest = max(lengths, default=0)
    assert all(a + b > budget - longest for a, b in pairwise(sizes))


def test_packed_worked_example():
    assert make_packed_batches([3, 9, 8, 4], 18) == [[0, 1], [2, 3]]
    assert make_packed_batches([], 18) == []
