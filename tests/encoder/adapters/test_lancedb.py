"""Real LanceDB queries, ranked by stored states."""

import lancedb
import numpy as np
import pytest
from lancedb.index import FTS

from kalm_encoder import Reranker
from kalm_encoder.adapters.lancedb import KaLMReranker
from kalm_encoder.errors import InputError, MissingIdsError
from tests.conftest import make_texts

QUERY = "token state"


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """What users search: their own table, with the same ids."""
    rng = np.random.default_rng(0)
    rows = [
        {"id": f"p{i}", "text": text, "vector": rng.standard_normal(8).astype(np.float32)}
        for i, text in enumerate(make_texts(60))
    ]
    table = lancedb.connect(tmp_path_factory.mktemp("db")).create_table("docs", rows)
    table.create_index("text", config=FTS())
    return table


def search(table, kind):
    if kind == "vector":
        return table.search(np.ones(8, np.float32), query_type="vector")
    if kind == "fts":
        return table.search(QUERY, query_type="fts")
    return table.search(query_type="hybrid").vector(np.ones(8, np.float32)).text(QUERY)


@pytest.mark.parametrize("kind", ["vector", "fts", "hybrid"])
@pytest.mark.parametrize("return_score", ["relevance", "all"])
def test_results_come_in_the_order_of_stored_scores(reranker, searched, kind, return_score):
    ours = KaLMReranker(reranker, return_score=return_score)
    query = search(searched, kind).limit(20)
    rows = (query.rerank(ours, QUERY) if kind == "vector" else query.rerank(ours)).to_list()
    assert rows
    want = reranker.rerank(QUERY, [r["id"] for r in rows])
    assert [r["id"] for r in rows] == [r.id for r in want]
    np.testing.assert_allclose([r["_relevance_score"] for r in rows], [r.score for r in want], 1e-5)
    kept = {"vector": {"_distance"}, "fts": {"_score"}, "hybrid": {"_distance", "_score"}}[kind]
    assert all((name in rows[0]) == (return_score == "all") for name in kept)


def test_options_reach_the_reranker(small_table, searched):
    ours = KaLMReranker(str(small_table), cascade=[(8, 3), (2, None)])
    assert len(search(searched, "fts").limit(10).rerank(ours).to_list()) == 10
    assert "KaLMReranker" in str(ours)


def test_results_without_states_are_named(reranker, searched):
    with pytest.raises(InputError, match="no column 'key': select it"):
        search(searched, "fts").rerank(KaLMReranker(reranker, id_column="key")).to_list()
    with pytest.raises(MissingIdsError, match="are not in"):
        search(searched, "fts").rerank(KaLMReranker(reranker, id_column="text")).to_list()
