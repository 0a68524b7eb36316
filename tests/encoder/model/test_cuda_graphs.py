"""Rounding a batch up to the shape of a graph changes no score; on a GPU, graphs score as launches.

What needs no GPU is tested without one: the tensors that a graph reads hold the same batch.
"""

import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalm_encoder import QueryDecoder
from kalm_encoder.model import cuda_graphs
from kalm_encoder.model.cuda_graphs import Recorded, Shape, round_up, usual_shapes
from kalm_encoder.model.decoder_forward import PassageMemory, last_hidden
from kalm_encoder.model.pairs import Pair, memory_of
from tests.conftest import make_texts
from tests.support.random_model import TINY, make_checkpoint

DIMENSIONS = replace(TINY, hidden=64, intermediate=64, layers=2, head_dim=32)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs") / "two-layers"
    return make_checkpoint(folder, make_texts(100), dimensions=DIMENSIONS)


@pytest.fixture(scope="module")
def decoder(two_layers):
    return QueryDecoder(str(two_layers), device="cpu")


@given(rows=st.integers(1, 200), prompt=st.integers(1, 400), states=st.integers(1, 400))
def test_a_batch_is_rounded_up_to_one_of_few_shapes(rows, prompt, states):
    shape = round_up(rows, prompt, states)
    if rows > 128 or prompt > 256 or states > 256:
        assert shape is None
        return
    assert shape.rows >= rows
    assert 0 <= shape.prompt - prompt < 32
    assert shape.states >= states
    assert round_up(*shape) == shape


def test_short_queries_meet_only_shapes_that_were_recorded():
    usual = set(usual_shapes(70))
    assert len(usual) == len(usual_shapes(70)) == 45
    for rows in (1, 10, 100, 128):
        for query in range(65):
            assert round_up(rows, 70 + query, 20) in usual


def _graph_tensors(decoder, shape, junk):
    """The tensors of a graph of this shape, which hold what an earlier batch left."""
    rows, length, num_states = shape
    return Recorded(
        graph=None,
        prompt=torch.full((length,), 7),
        positions=torch.full((length,), 3),
        memory=PassageMemory(
            torch.full((rows, num_states, decoder.dim), junk),
            torch.ones((rows, num_states), dtype=torch.bool),
        ),
        hidden=None,
    )


@pytest.mark.parametrize("sizes", [[5], [3, 16, 1], [9] * 8])
@pytest.mark.parametrize("query", ["", "token state", "word " * 8])
def test_the_added_rows_states_and_tokens_change_nothing(decoder, sizes, query):
    rng = np.random.default_rng(0)
    prompt = decoder.prompt(query)
    pairs = [Pair(prompt, rng.standard_normal((m, decoder.dim)).astype(np.float32)) for m in sizes]
    memory = memory_of(pairs, decoder.device, torch.float32)
    tokens = torch.tensor(prompt.ids)
    want, _ = last_hidden(decoder.model, tokens[None], memory)
    shape = round_up(len(pairs), len(tokens), memory.states.shape[1])
    recorded = _graph_tensors(decoder, shape, float("nan"))
    recorded.fill(tokens, memory)
    got, _ = last_hidden(
        decoder.model, recorded.prompt[None], recorded.memory, positions=recorded.positions
    )
    torch.testing.assert_close(got[: len(pairs)], want, atol=1e-5, rtol=0)
    assert torch.isfinite(got).all()


@pytest.mark.gpu
@needs_gpu
def test_graphs_score_as_launches_in_bfloat16(two_layers):
    launched = QueryDecoder(str(two_layers), device="cuda")
    launched.graphs = None
    graphs = QueryDecoder(str(two_layers), device="cuda")
    graphs.warm_up()
    rng = np.random.default_rng(0)
    for count in (1, 5, 33, 128, 130):
        states = [rng.standard_normal((7 + i % 9, 64)).astype(np.float16) for i in range(count)]
        for got, right in zip(graphs.score("q", states), launched.score("q", states), strict=True):
            assert abs(got[0] - right[0]) <= 0.02


@pytest.mark.gpu
@needs_gpu
def test_after_the_warm_up_a_request_records_nothing_and_waits_once(two_layers, monkeypatch):
    decoder = QueryDecoder(str(two_layers), device="cuda")
    decoder.warm_up()
    assert decoder.graphs._usable
    assert set(decoder.graphs._recorded) == set(usual_shapes(len(decoder.prompt("").ids)))
    monkeypatch.setattr(cuda_graphs.DecoderGraphs, "_record", None)
    rng = np.random.default_rng(0)
    states = [rng.standard_normal((20 + i % 9, 64)).astype(np.float16) for i in range(100)]
    decoder.score("token state", states)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always")
            decoder.score("token state", states)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in noted if "synchroniz" in str(w.message)]) == 1


@pytest.mark.gpu
@needs_gpu
def test_a_shape_is_a_graph_of_its_own(two_layers):
    decoder = QueryDecoder(str(two_layers), device="cuda")
    states = [np.ones((5, 64), dtype=np.float16)] * 3
    decoder.score("q", states)
    decoder.score("q", states * 5)
    assert {s.rows for s in decoder.graphs._recorded} == {8, 16}
    assert all(isinstance(shape, Shape) for shape in decoder.graphs._recorded)


@pytest.mark.gpu
@needs_gpu
def test_a_pickled_decoder_records_its_graphs_anew(two_layers):
    decoder = QueryDecoder(str(two_layers), device="cuda")
    states = [np.ones((5, 64), dtype=np.float16)] * 3
    right = decoder.score("q", states)
    copy = pickle.loads(pickle.dumps(decoder))
    assert not copy.graphs._recorded
    assert copy.score("q", states) == right
