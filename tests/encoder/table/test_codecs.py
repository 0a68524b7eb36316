import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder.errors import InputError
from kalm_encoder.table.codecs import CODECS, INT4_GROUP
from kalm_encoder.table.spec import TableSpec

SHAPES = {"dim": st.integers(1, 200), "count": st.integers(1, 5), "seed": st.integers(0, 2**31)}


def states_of(count, dim, seed, spread=1.0):
    return (spread * np.random.default_rng(seed).standard_normal((count, dim))).astype(np.float32)


@pytest.mark.parametrize("name", CODECS)
@given(**SHAPES, exponent=st.integers(-3, 3))
def test_the_error_is_at_most_half_a_step(name, dim, count, seed, exponent):
    codec = CODECS[name]
    states = states_of(count, dim, seed, 10.0**exponent)
    stored = codec.encode(states)
    assert stored.shape == (count, codec.width(dim))
    assert stored.dtype == codec.dtype
    error = np.abs(codec.decode(stored, dim).astype(np.float64) - states)
    if name.startswith("float"):
        assert (error <= np.abs(states) * 2.0**-11 + 1e-7).all()
        return
    group = INT4_GROUP if name == "int4" else dim
    for start in range(0, dim, group):
        top = np.abs(states[:, start : start + group]).max(axis=1, keepdims=True)
        # half a step, and what rounding the scale to float16 moves the largest value
        bound = top / codec.top / 2 + top * 2.0**-10 + codec.top * 2.0**-25
        assert (error[:, start : start + group] <= bound).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_layouts_are_as_documented(name):
    codec = CODECS[name]
    states = np.array([[127.0, -127.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    stored = codec.encode(states)
    if name == "int8":
        assert stored.tolist() == [[127, 129, 0, 0x00, 0x3C], [0] * 5]  # scale 1.0 is 0x3C00
    else:
        scale = np.array([127 / 7], "<f2").tobytes()
        assert stored.tolist() == [[0x1F, 0x88, *scale], [0x88, 0x88, 0, 0]]
    np.testing.assert_allclose(codec.decode(stored, 3), states, rtol=1e-3)


def test_sizes_against_float16():
    spec = {n: TableSpec("m", None, "f", 640, 1024, (4,), n).bytes_per_token for n in CODECS}
    assert spec["int8"] / spec["float16"] == pytest.approx(0.5016, abs=1e-4)
    assert spec["int4"] / spec["float16"] == pytest.approx(0.2656, abs=1e-4)
    with pytest.raises(InputError, match="'int2' is not one of float16, float32, int8, int4"):
        TableSpec("m", None, "f", 640, 1024, (4,), "int2")
