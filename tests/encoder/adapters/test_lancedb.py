"""Real LanceDB queries, ranked by stored states."""

import asyncio

import lancedb
import numpy as np
import pyarrow as pa
import pytest
from lancedb.index import FTS
from lancedb.query import (
    BooleanQuery,
    BoostQuery,
    MatchQuery,
    MultiMatchQuery,
    Occur,
    PhraseQuery,
)

from kalm_encoder import Reranker
from kalm_encoder.adapters.lancedb import KaLMReranker, query_text
from kalm_encoder.errors import InputError, MissingIdsError
from tests.conftest import encode_table, make_texts, write_corpus

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
    table.create_index("text", config=FTS(with_position=True))  # phrases need positions
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
    asked = KaLMReranker(small_table, instruction="Judge it.", system_instruction="Yes?")
    rows = search(searched, "fts").limit(10).rerank(asked).to_list()
    how = {"instruction": "Judge it.", "system_instruction": "Yes?"}
    want = Reranker.open(small_table).rerank(QUERY, [r["id"] for r in rows], **how)
    np.testing.assert_allclose([r["_relevance_score"] for r in rows], [r.score for r in want], 1e-5)


@pytest.mark.parametrize(
    ("query", "text"),
    [
        (MatchQuery(QUERY, "text"), QUERY),
        (PhraseQuery("token state", "text"), QUERY),
        (MultiMatchQuery(QUERY, ["text"]), QUERY),
        (BoostQuery(MatchQuery(QUERY, "text"), MatchQuery("shard", "text")), QUERY),
        (MatchQuery("token", "text") & MatchQuery("state", "text"), QUERY),
        (MatchQuery(QUERY, "text") | MatchQuery(QUERY, "text"), QUERY),
        (
            BooleanQuery(
                [
                    (Occur.MUST, MatchQuery("token", "text")),
                    (Occur.MUST_NOT, MatchQuery("shard", "text")),
                    (Occur.SHOULD, MatchQuery("state", "text")),
                ]
            ),
            QUERY,
        ),
    ],
)
def test_every_kind_of_full_text_query_is_ranked_by_its_text(reranker, searched, query, text):
    rows = searched.search(query, query_type="fts").limit(9).rerank(KaLMReranker(reranker))
    assert query_text(query) == text
    rows = rows.to_list()
    want = reranker.rerank(text, [r["id"] for r in rows])
    np.testing.assert_allclose([r["_relevance_score"] for r in rows], [r.score for r in want], 1e-5)
    hybrid = searched.search(query_type="hybrid").vector(np.ones(8, np.float32)).text(query)
    rows = hybrid.limit(9).rerank(KaLMReranker(reranker)).to_list()
    want = reranker.rerank(text, [r["id"] for r in rows])
    assert rows and [r["id"] for r in rows] == [r.id for r in want]


@pytest.mark.parametrize("query", [QUERY, MatchQuery(QUERY, "text")])
def test_async_queries_are_ranked_too(reranker, searched, query):
    async def run():
        connected = await lancedb.connect_async(searched._conn.uri)
        table = await connected.open_table("docs")
        found = await table.search(query, query_type="fts")
        return await found.limit(9).rerank(KaLMReranker(reranker)).to_list()

    rows = asyncio.run(run())
    want = reranker.rerank(QUERY, [r["id"] for r in rows])
    assert rows and [r["id"] for r in rows] == [r.id for r in want]


def test_a_query_without_text_is_named(reranker):
    rows = pa.table({"id": ["p1"]})
    with pytest.raises(
        InputError, match=r"no text to rank by: give it as rerank\(reranker, query_"
    ):
        KaLMReranker(reranker).rerank_vector(None, rows)


@pytest.mark.parametrize(
    "options", [{"topk": 3}, {"top_k": 3}, {"model_name": "x"}, {"column": "text"}]
)
def test_unknown_options_are_refused_when_it_is_made(reranker, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        KaLMReranker(reranker, **options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"ratio": 3}, "ratio 3 is not a multiple"),
        ({"cascade": [(2, 3), (8, None)]}, "coarse to fine"),
        ({"max_ms": 0}, "max_ms 0"),
        ({"on_missing": "skip"}, "error, drop or last"),
    ],
)
def test_impossible_options_are_refused_when_it_is_made(reranker, options, problem):
    with pytest.raises(InputError, match=problem):
        KaLMReranker(reranker, **options)


@pytest.mark.parametrize("kind", ["vector", "fts", "hybrid"])
def test_the_relevance_never_rises_and_a_cascade_shows_the_ratio(reranker, searched, kind):
    """Also where a candidate that was dropped early had a higher score at the coarse ratio."""
    stages = [(8, 3), (2, None)]
    ours = KaLMReranker(reranker, cascade=stages)
    query = search(searched, kind).limit(20)
    rows = (query.rerank(ours, QUERY) if kind == "vector" else query.rerank(ours)).to_list()
    want = reranker.rerank(QUERY, [r["id"] for r in rows], cascade=stages)
    assert [r["id"] for r in rows] == [r.id for r in want]
    assert (
        [r["_relevance_ratio"] for r in rows]
        == [r.ratio for r in want]
        == [2] * 3 + [8] * (len(rows) - 3)
    )
    relevance = [r["_relevance_score"] for r in rows]
    assert relevance == sorted(relevance, reverse=True)
    np.testing.assert_allclose(relevance[:3], [r.score for r in want[:3]], 1e-5)
    plain = search(searched, "fts").limit(3).rerank(KaLMReranker(reranker)).to_list()
    assert "_relevance_ratio" not in plain[0]


@pytest.fixture(scope="module")
def newer(tmp_path_factory):
    """A searched table with rows that the passage table does not hold."""
    ids = ["p1", "new-1", "p2", "new-2", "p3"]
    rows = [{"id": i, "text": "token state", "vector": [1.0] * 8} for i in ids]
    table = lancedb.connect(tmp_path_factory.mktemp("newer")).create_table("docs", rows)
    table.create_index("text", config=FTS())
    return table


def test_rows_without_states_can_be_dropped_or_ranked_last(reranker, newer):
    def ranked(**options):
        ours = KaLMReranker(reranker, **options)
        return search(newer, "fts").limit(5).rerank(ours).to_list()

    with pytest.raises(MissingIdsError, match=r"id_column \(now 'id'\), or .*on_missing='drop'"):
        ranked()
    assert {r["id"] for r in ranked(on_missing="drop")} == {"p1", "p2", "p3"}
    last = ranked(on_missing="last")
    assert {r["id"] for r in last[3:]} == {"new-1", "new-2"}
    assert [r["_relevance_score"] for r in last[3:]] == [0.0, 0.0]


def test_integer_ids_are_decimal_strings_and_others_are_refused(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", make_texts(5), prefix="")
    encode_table(model_dir, corpus, tmp_path / "t.lance")
    ours = KaLMReranker(tmp_path / "t.lance")
    numbers = pa.table({"id": pa.array([3, 1, 4])})
    assert set(ours.rerank_vector("q", numbers)["id"].to_pylist()) == {1, 3, 4}
    for bad in (pa.array([3.0]), pa.array([None], pa.string())):
        with pytest.raises(InputError, match="is not an id"):
            ours.rerank_vector("q", pa.table({"id": bad}))


def test_results_without_states_are_named(reranker, searched):
    with pytest.raises(InputError, match="no column 'key': select it"):
        search(searched, "fts").rerank(KaLMReranker(reranker, id_column="key")).to_list()
    with pytest.raises(MissingIdsError, match="are not in"):
        search(searched, "fts").rerank(KaLMReranker(reranker, id_column="text")).to_list()
