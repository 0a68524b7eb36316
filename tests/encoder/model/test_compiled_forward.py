"""The compiled forward on a CPU: the same scores, few shapes. A GPU's CUDA graphs are not tried."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from kalm_encoder import QueryDecoder, Reranker
from kalm_encoder.errors import InputError
from kalm_encoder.model.compiled_forward import CompiledForward
from kalm_encoder.model.decoder_forward import PassageMemory
from kalm_encoder.model.pairs import Pair
from kalm_encoder.service.live import LiveTable
from kalm_encoder.service.settings import Settings
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.random_model import TINY, make_checkpoint

DIMENSIONS = replace(TINY, hidden=64, intermediate=64, layers=2, head_dim=32)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compiled") / "two-layers"
    return make_checkpoint(folder, make_texts(100), dimensions=DIMENSIONS)


@pytest.fixture(scope="module")
def eager(two_layers):
    return QueryDecoder(str(two_layers))


@pytest.fixture(scope="module")
def compiled(two_layers):
    torch._dynamo.reset()
    counters.clear()
    made = QueryDecoder(str(two_layers), compile=True)
    made.warm_up()
    return made


def test_scores_equal_eager_for_odd_batches_and_one_graph_does_for_all(eager, compiled):
    rng = np.random.default_rng(0)
    queries = ["", "token state", "which shard holds the passage " * 4, "word " * 100]
    for count, longest in ((1, 1), (2, 8), (3, 9), (7, 40), (33, 5), (5, 300)):
        pairs = [
            Pair(
                compiled.prompt(random.Random(i).choice(queries)),
                rng.standard_normal((rng.integers(1, longest + 1), 64)).astype(np.float32),
            )
            for i in range(count)
        ]
        for got, right in zip(compiled.score_pairs(pairs), eager.score_pairs(pairs), strict=True):
            assert abs(got[0] - right[0]) <= 1e-5
            assert abs(got[1] - right[1]) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"]
    assert not counters["graph_break"]


def test_different_queries_of_one_length_share_a_batch(eager, compiled):
    states = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    prompts = [eager.prompt(q) for q in ("token", "index", "table", "state")]
    assert len({len(p.ids) for p in prompts}) == 1
    pairs = [Pair(p, states) for p in prompts]
    for got, right in zip(compiled.score_pairs(pairs), eager.score_pairs(pairs), strict=True):
        assert abs(got[0] - right[0]) <= 1e-5


def test_every_batch_has_a_shape_that_was_foreseen(compiled):
    rng = random.Random(0)
    forward = CompiledForward(compiled.model, token_budget=20_000)
    met = []
    forward._run = lambda _, prompts, *more: (
        met.append((*prompts.shape, more[1].shape[1])),
        more[1][:, 0],
    )[1]
    for length in (80, 128, 130):
        foreseen = forward.shapes(length)
        assert len(foreseen) == len(set(foreseen)) <= 42
        assert all(rows * (p + m) <= 20_000 for rows, p, m in foreseen)
        for count in (1, 5, 64, 200, 513):
            sizes = [rng.randint(1, 256) for _ in range(count)]
            plan = forward.make_batches(sizes, length)
            assert sorted(i for batch in plan for i in batch) == list(range(count))
            met.clear()
            for batch in plan:
                longest = max(sizes[i] for i in batch)
                memory = fresh(len(batch), longest)
                assert len(forward(torch.zeros((1, length), dtype=torch.long), memory)) == len(
                    batch
                )
            assert set(met) <= set(foreseen)


def fresh(rows, states):
    return PassageMemory(torch.zeros((rows, states, 64)), torch.ones((1, states), dtype=torch.bool))


def test_a_service_compiles_in_its_device_thread(compiled, two_layers, tmp_path):
    uri = tmp_path / "t.lance"
    encode_table(two_layers, write_corpus(tmp_path / "c.jsonl", make_texts(30)), uri)
    ids = [f"p{i}" for i in range(30)]
    right = {r.id: r.score for r in Reranker.open(str(uri)).rerank("token state", ids)}
    live = LiveTable(Settings(str(uri), compile=True))
    live.load()
    try:
        version = live.current
        assert version.decoder.decoder.compiled is not None
        for result in version.reranker.rerank("token state", ids):
            assert abs(result.score - right[result.id]) <= 1e-5
    finally:
        live.close()
    assert counters["stats"]["unique_graphs"] == 1, "the same architecture compiles once a process"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_score_as_eager_in_bfloat16(two_layers):
    eager = QueryDecoder(str(two_layers), device="cuda")
    compiled = QueryDecoder(str(two_layers), device="cuda", compile=True)
    compiled.warm_up()
    rng = np.random.default_rng(0)
    for count in (1, 5, 33, 130):
        states = [rng.standard_normal((7 + i % 9, 64)).astype(np.float16) for i in range(count)]
        for got, right in zip(compiled.score("q", states), eager.score("q", states), strict=True):
            assert abs(got[0] - right[0]) <= 0.02


def test_hot_passages_and_compile_exclude_each_other(two_layers):
    with pytest.raises(InputError, match="cannot be combined"):
        QueryDecoder(str(two_layers), compile=True, hot_bytes=1 << 20)
