import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from kalm_encoder.matryoshka import coarsen, num_groups
from kalm_encoder.model.batching import Packed
from kalm_encoder.model.pooling import mean_pool, pool_packed, within


def pool_one(x: np.ndarray, ratio: int) -> np.ndarray:
    """The definition, written as a loop."""
    return np.stack([x[i : i + ratio].mean(axis=0) for i in range(0, len(x), ratio)])


def test_worked_example():
    states = torch.tensor([[[1.0], [2.0], [3.0], [4.0], [5.0]]])
    pooled = mean_pool(states, torch.ones(1, 5), 2)
    assert pooled.flatten().tolist() == [1.5, 3.5, 5.0]
    assert coarsen(pooled[0].numpy(), 5, 2, 4).flatten().tolist() == [2.5, 5.0]


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    ratio=st.sampled_from([1, 2, 3, 4, 8, 16, 32, 64, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_padding_never_enters_a_mean(lengths, ratio, seed):
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal((n, 3)).astype(np.float32) for n in lengths]
    longest = max(lengths)
    padded = np.full((len(rows), longest, 3), 1e6, np.float32)
    mask = np.zeros((len(rows), longest), np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
        mask[i, : len(row)] = 1
    pooled = mean_pool(torch.from_numpy(padded), torch.from_numpy(mask), ratio).numpy()
    for i, row in enumerate(rows):
        m = num_groups(len(row), ratio)
        np.testing.assert_allclose(pooled[i, :m], pool_one(row, ratio), atol=1e-5)
        assert not pooled[i, m:].any()
    packed = pool_packed(
        torch.from_numpy(np.concatenate(rows)), Packed(lengths, torch.device("cpu")), ratio
    ).numpy()
    np.testing.assert_allclose(
        packed, np.concatenate([pool_one(row, ratio) for row in rows]), atol=1e-5
    )


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    stored=st.integers(1, 32),
    factor=st.integers(1, 32),
    seed=st.integers(0, 2**32 - 1),
)
def test_coarsening_equals_pooling_at_the_coarse_ratio(lengths, stored, factor, seed):
    rng, wanted = np.random.default_rng(seed), stored * factor
    passages = [rng.standard_normal((n, 4)).astype(np.float32) for n in lengths]
    pooled = [pool_one(x, stored) for x in passages]
    alone = [coarsen(p, n, stored, wanted) for p, n in zip(pooled, lengths, strict=True)]
    for coarse, x in zip(alone, passages, strict=True):
        np.testing.assert_allclose(coarse, pool_one(x, wanted), atol=2e-6)
    together = coarsen(np.concatenate(pooled), np.array(lengths), stored, wanted)
    assert np.array_equal(together, np.concatenate(alone))


def test_coarsening_refuses_what_is_no_multiple():
    with pytest.raises(InputError, match="ratio 6 is not a multiple of the stored ratio 4"):
        coarsen(np.zeros((3, 2), np.float32), 12, 4, 6)
    with pytest.raises(InputError, match="3 states cannot belong to 20 tokens"):
        coarsen(np.zeros((3, 2), np.float32), 20, 4, 8)


def test_bfloat16_is_accumulated_in_float32():
    states = torch.full((1, 128, 1), 1.0, dtype=torch.bfloat16)
    states[0, 0, 0] = 256.0  # 256 + 1 is 256 in bfloat16
    pooled = mean_pool(states, torch.ones(1, 128, dtype=torch.bool), 128)
    assert pooled.dtype == torch.float32
    assert pooled.item() == (256 + 127) / 128


@given(
    values=st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1),
    limit=st.sampled_from([65504.0, float("inf"), 1.5]),
)
def test_what_a_store_cannot_hold_is_found_on_the_device(values, limit):
    rows = np.zeros((len(values), 3), np.float32)
    rows[:, 1] = values
    found = within(torch.from_numpy(rows), limit).tolist()
    assert found == [bool(abs(np.float32(value)) <= limit) for value in values]
    with np.errstate(over="ignore"):
        assert np.array_equal(
            torch.from_numpy(rows).half().numpy(), rows.astype(np.float16), equal_nan=True
        )
