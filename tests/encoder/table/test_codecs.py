import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from kalm_encoder.table.codecs import CODECS, VERSION_1
from kalm_encoder.table.spec import TableSpec

COUNTS = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(np.array)


def states_of(count, dim, seed, spread=1.0):
    return (spread * np.random.default_rng(seed).standard_normal((count, dim))).astype(np.float32)


def there_and_back(codec, states, counts):
    return codec.decode(codec.encode(states, counts), counts, states.shape[1])


@pytest.mark.parametrize("codec", [*CODECS.values(), VERSION_1["int8"], VERSION_1["int4"]], ids=str)
@given(
    dim=st.integers(1, 200), counts=COUNTS, seed=st.integers(0, 2**31), exponent=st.integers(-3, 3)
)
def test_the_error_is_bounded_by_a_step(codec, dim, counts, seed, exponent):
    states = states_of(counts.sum(), dim, seed, 10.0**exponent)
    stored = codec.encode(states, counts)
    assert stored.shape == (len(states) + codec.extra * len(counts), codec.width(dim))
    assert stored.dtype == codec.dtype
    error = np.linalg.norm(codec.decode(stored, counts, dim) - states, axis=1)
    # A step is at most max(|x|) / 7, or |x| / 8 after a rotation, and half of 128 values reach it.
    largest = np.abs(states).max() * (2 if codec.extra else 1)
    bits = {np.float16: 11, np.float32: 23}.get(codec.dtype) or codec.bits - 1
    steps = dim**0.5 if bits > 8 else 8 * np.ceil(dim / 64)
    assert (error <= 1.3 * largest * steps / 2.0**bits + 1e-6).all()


@pytest.mark.parametrize(("name", "now", "before"), [("int8", 0.008, 0.02), ("int4", 0.04, 0.19)])
def test_large_dimensions_do_not_take_the_bits_of_the_others(name, now, before):
    """States of real encoders: outlier dimensions, and much that a passage's states share."""
    rng = np.random.default_rng(0)
    counts = rng.integers(5, 60, 20)
    sizes = np.ones(640, np.float32)
    sizes[rng.permutation(640)[:10]] = 15
    shared = np.repeat(states_of(len(counts), 640, 1), counts, axis=0)
    states = sizes * (shared + 0.25 * states_of(counts.sum(), 640, 2))

    def error(codec):
        found = there_and_back(codec, states, counts)
        return np.linalg.norm(found - states) / np.linalg.norm(states)

    assert error(CODECS[name]) < now
    assert error(VERSION_1[name]) > before


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_zeros_stay_zeros_and_the_largest_states_are_finite(name):
    codec, counts = CODECS[name], np.array([2])
    assert not there_and_back(codec, np.zeros((2, 70), np.float32), counts).any()
    largest = np.full((2, 70), codec.limit, np.float32)
    largest[1] *= -1
    error = np.abs(there_and_back(codec, largest, counts) - largest)
    assert error.max() < codec.limit / 4


def test_sizes_against_float16():
    spec = {n: TableSpec("m", None, "f", 640, 1024, (4,), n) for n in CODECS}
    float16 = spec["float16"].read_bytes(150, 4)
    assert spec["int8"].read_bytes(150, 4) / float16 == pytest.approx(0.5078, abs=1e-4)
    assert spec["int4"].read_bytes(150, 4) / float16 == pytest.approx(0.2646, abs=1e-4)
    with pytest.raises(InputError, match="'int2' is not one of float16, float32, int8, int4"):
        TableSpec("m", None, "f", 640, 1024, (4,), "int2")
