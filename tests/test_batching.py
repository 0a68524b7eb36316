from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.batching import padded_size, plan_batches


@given(
    lengths=st.lists(st.integers(1, 1024), max_size=200),
    budget=st.integers(1, 8192),
    overhead=st.integers(0, 100),
)
def test_every_item_once_and_within_budget(lengths, budget, overhead):
    batches = plan_batches(lengths, budget, overhead=overhead)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or len(batch) * (longest + overhead) <= budget
    assert padded_size(lengths, batches) >= sum(lengths)


def test_worked_example():
    assert plan_batches([3, 9, 8], 18) == [[1, 2], [0]]
