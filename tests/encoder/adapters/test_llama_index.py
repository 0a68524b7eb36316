"""Nodes of LlamaIndex, ranked by stored states."""

import asyncio

import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from pydantic import ValidationError

from kalm_encoder import Reranker
from kalm_encoder.adapters.llama_index import KaLMNodePostprocessor
from kalm_encoder.errors import InputError, MissingIdsError
from tests.conftest import make_texts

QUERY = "token state"
NUMBERS = (7, 3, 41, 0, 22)
IDS = [f"p{i}" for i in NUMBERS]


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


@pytest.fixture
def nodes():
    texts = make_texts(60)
    return [
        NodeWithScore(node=TextNode(text=texts[i], id_=f"p{i}"), score=0.5 + i) for i in NUMBERS
    ]


def test_nodes_come_best_first_with_their_scores(reranker, nodes):
    postprocessor = KaLMNodePostprocessor(reranker=reranker)
    assert isinstance(postprocessor, BaseNodePostprocessor)
    got = postprocessor.postprocess_nodes(nodes, query_str=QUERY)
    want = [(r.id, r.score) for r in reranker.rerank(QUERY, IDS)]
    assert [(n.node.node_id, n.score) for n in got] == want
    assert [n.node.node_id for n in got] != IDS
    bundle = QueryBundle(QUERY)
    assert postprocessor.postprocess_nodes(nodes, bundle) == got
    assert asyncio.run(postprocessor.apostprocess_nodes(nodes, bundle)) == got
    assert [n.score for n in nodes] == [0.5 + i for i in NUMBERS]


def test_nodes_can_be_found_by_their_text(small_table, reranker, nodes):
    want = KaLMNodePostprocessor(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    strangers = [
        NodeWithScore(node=TextNode(text=n.text, metadata={"page": "1"}), score=n.score)
        for n in nodes
    ]
    matching = KaLMNodePostprocessor(reranker=small_table, match_text=True)
    got = matching.postprocess_nodes(strangers, query_str=QUERY)
    assert [(n.text, n.score) for n in got] == [(n.text, n.score) for n in want]


def test_the_retrieval_score_is_kept_where_asked_for(reranker, nodes):
    keep = KaLMNodePostprocessor(reranker=reranker, keep_retrieval_score=True)
    for node in keep.postprocess_nodes(nodes, query_str=QUERY):
        number = int(node.node.node_id[1:])
        assert node.node.metadata == {"retrieval_score": 0.5 + number}
        assert node.text == make_texts(60)[number]
    assert all(n.node.metadata == {} for n in nodes)
    plain = KaLMNodePostprocessor(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    assert all(n.node.metadata == {} for n in plain)


def test_top_n_and_the_rerank_options_are_used(small_table, reranker, nodes):
    options = {"ratio": 8, "instruction": "Judge it.", "system_instruction": "Yes?"}
    got = KaLMNodePostprocessor(reranker=str(small_table), top_n=2, **options)
    want = reranker.rerank(QUERY, IDS, top_k=2, **options)
    assert [n.score for n in got.postprocess_nodes(nodes, query_str=QUERY)] == [
        r.score for r in want
    ]
    stages = [(8, 3), (2, None)]
    staged = KaLMNodePostprocessor(reranker=reranker, cascade=stages, max_ms=60_000)
    ids = [n.node.node_id for n in staged.postprocess_nodes(nodes, query_str=QUERY)]
    assert ids == [r.id for r in reranker.rerank(QUERY, IDS, cascade=stages)]


def test_the_id_is_the_metadata_key_else_the_nodes_own(reranker):
    nodes = [
        NodeWithScore(node=TextNode(text="a", id_="p1", metadata={"id": "p5"})),
        NodeWithScore(node=TextNode(text="b", id_="p1")),
        NodeWithScore(node=TextNode(text="c", id_="p5")),
    ]
    got = KaLMNodePostprocessor(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    want = {r.id: r.score for r in reranker.rerank(QUERY, ["p1", "p5"])}
    assert {n.text: n.score for n in got} == {"a": want["p5"], "b": want["p1"], "c": want["p5"]}


def test_it_is_rebuilt_from_its_serialised_form(small_table, nodes):
    ours = KaLMNodePostprocessor(reranker=str(small_table), top_n=2)
    again = KaLMNodePostprocessor.from_dict(ours.to_dict())
    assert again.postprocess_nodes(nodes, query_str=QUERY) == ours.postprocess_nodes(
        nodes, query_str=QUERY
    )


def test_what_is_wrong_is_named(reranker, nodes):
    postprocessor = KaLMNodePostprocessor(reranker=reranker)
    with pytest.raises(InputError, match="no query to rank by: give query_bundle or query_str"):
        postprocessor.postprocess_nodes(nodes)
    with pytest.raises(MissingIdsError, match="'elsewhere'"):
        postprocessor.postprocess_nodes(
            [NodeWithScore(node=TextNode(text="x", id_="elsewhere"))], query_str=QUERY
        )
    assert postprocessor.postprocess_nodes([], query_str=QUERY) == []
    for wrong in ({"top_n": 0}, {"topn": 3}):
        with pytest.raises(ValidationError):
            KaLMNodePostprocessor(reranker=reranker, **wrong)


def test_an_id_that_is_not_stored_is_named_with_the_key_to_set(reranker):
    """The ids of nodes are random, unless a splitter is told otherwise."""
    nodes = [NodeWithScore(node=TextNode(text="chunk", metadata={"doc": "p1"}))]
    with pytest.raises(MissingIdsError, match=r"as id_key \(now 'id'\), or .*on_missing='drop'"):
        KaLMNodePostprocessor(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    keyed = KaLMNodePostprocessor(reranker=reranker, id_key="doc")  # the remedy
    assert len(keyed.postprocess_nodes(nodes, query_str=QUERY)) == 1


def test_unknown_nodes_can_be_dropped_or_ranked_last(reranker, nodes):
    given = [NodeWithScore(node=TextNode(text="new", id_="new"), score=9.0), *nodes]
    plain = KaLMNodePostprocessor(reranker=reranker).postprocess_nodes(nodes, query_str=QUERY)
    dropped = KaLMNodePostprocessor(reranker=reranker, on_missing="drop")
    assert dropped.postprocess_nodes(given, query_str=QUERY) == plain
    last = KaLMNodePostprocessor(reranker=reranker, on_missing="last")
    *first, unknown = last.postprocess_nodes(given, query_str=QUERY)
    assert first == plain and (unknown.node.node_id, unknown.score) == ("new", 0.0)


def test_scores_never_rise_with_a_cascade_and_a_path_is_an_address(small_table, nodes):
    staged = KaLMNodePostprocessor(reranker=small_table, cascade=[(8, 2), (2, None)])
    scores = [n.score for n in staged.postprocess_nodes(nodes, query_str=QUERY)]
    assert scores == sorted(scores, reverse=True)
    again = KaLMNodePostprocessor.from_dict(staged.to_dict())
    assert [n.score for n in again.postprocess_nodes(nodes, query_str=QUERY)] == scores
    for wrong in ({"ratio": 3}, {"max_ms": -1.0}):
        with pytest.raises(InputError):
            KaLMNodePostprocessor(reranker=small_table, **wrong)
