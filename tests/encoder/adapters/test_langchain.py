"""Documents of LangChain, ranked by stored states."""

import asyncio

import pytest
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.runnables import RunnableLambda
from pydantic import ValidationError

from kalm_encoder import Reranker
from kalm_encoder.adapters.langchain import KaLMCompressor
from kalm_encoder.errors import InputError, MissingIdsError, MissingTextsError
from tests.conftest import make_texts

QUERY = "token state"
NUMBERS = (7, 3, 41, 0, 22)


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


@pytest.fixture
def documents():
    texts = make_texts(60)
    return [
        Document(page_content=texts[i], id=f"store-{i}", metadata={"id": f"p{i}", "page": i})
        for i in NUMBERS
    ]


def test_documents_come_best_first_with_their_scores(reranker, documents):
    compressor = KaLMCompressor(reranker=reranker)
    assert isinstance(compressor, BaseDocumentCompressor)
    got = compressor.compress_documents(documents, QUERY)
    want = reranker.rerank(QUERY, [f"p{i}" for i in NUMBERS])
    assert [(d.metadata["id"], d.metadata["relevance_score"]) for d in got] == [
        (r.id, r.score) for r in want
    ]
    assert [d.metadata["id"] for d in got] != [f"p{i}" for i in NUMBERS]
    by_id = {d.id: d for d in documents}
    for document in got:
        original = by_id[document.id]
        assert document.page_content == original.page_content
        assert document.metadata["page"] == original.metadata["page"]
        assert "relevance_score" not in original.metadata


def test_documents_can_be_found_by_their_text(small_table, reranker, documents):
    strangers = [d.model_copy(update={"id": None, "metadata": {}}) for d in documents]
    matching = KaLMCompressor(reranker=small_table, match_text=True, on_missing="drop")
    changed = Document(page_content=documents[0].page_content + "!")
    got = matching.compress_documents([changed, *strangers], QUERY)
    assert [(d.page_content, d.metadata) for d in got] == [
        (d.page_content, {"relevance_score": d.metadata["relevance_score"]})
        for d in KaLMCompressor(reranker=reranker).compress_documents(documents, QUERY)
    ]
    strict = KaLMCompressor(reranker=matching._reranker, match_text=True)
    with pytest.raises(MissingTextsError, match=r"^1 of the texts"):
        strict.compress_documents([changed, *strangers], QUERY)
    with pytest.raises(InputError, match="was opened without match_text"):
        KaLMCompressor(reranker=reranker, match_text=True)


def test_top_n_and_the_rerank_options_are_used(small_table, reranker, documents):
    compressor = KaLMCompressor(
        reranker=str(small_table),
        top_n=2,
        ratio=8,
        instruction="Judge it.",
        system_instruction="Yes?",
    )
    got = compressor.compress_documents(documents, QUERY)
    ids = [f"p{i}" for i in NUMBERS]
    how = {"ratio": 8, "instruction": "Judge it.", "system_instruction": "Yes?"}
    want = reranker.rerank(QUERY, ids, top_k=2, **how)
    assert [d.metadata["relevance_score"] for d in got] == [r.score for r in want]
    staged = KaLMCompressor(reranker=reranker, cascade=[(8, 3), (2, None)], max_ms=60_000)
    staged_ids = [d.metadata["id"] for d in staged.compress_documents(documents, QUERY)]
    assert staged_ids == [r.id for r in reranker.rerank(QUERY, ids, cascade=[(8, 3), (2, None)])]


def test_the_id_is_the_metadata_key_else_the_documents_own(reranker):
    documents = [
        Document(page_content="a", id="p1", metadata={"id": "p5"}),
        Document(page_content="b", id="p1"),
        Document(page_content="c", id="p2", metadata={"id": None}),
    ]
    got = KaLMCompressor(reranker=reranker).compress_documents(documents, QUERY)
    scores = {d.page_content: d.metadata["relevance_score"] for d in got}
    want = {r.id: r.score for r in reranker.rerank(QUERY, ["p5", "p1", "p2"])}
    assert scores == {"a": want["p5"], "b": want["p1"], "c": want["p2"]}
    keyed = KaLMCompressor(reranker=reranker, id_key="key", top_n=1)
    chunk = Document(page_content="d", metadata={"key": "p9"})
    again = keyed.compress_documents([chunk, chunk], QUERY)  # two chunks of one passage
    assert [d.metadata["key"] for d in again] == ["p9"]


def test_it_runs_in_a_chain_and_async(reranker, documents):
    compressor = KaLMCompressor(reranker=reranker, top_n=3)
    want = compressor.compress_documents(documents, QUERY)
    chain = RunnableLambda(lambda query: compressor.compress_documents(documents, query))
    assert chain.invoke(QUERY) == want
    assert asyncio.run(compressor.acompress_documents(documents, QUERY)) == want
    assert compressor.compress_documents([], QUERY) == []


def test_what_is_wrong_is_named(reranker, documents):
    compressor = KaLMCompressor(reranker=reranker)
    with pytest.raises(InputError, match=r"document 1 \('no id'\) has no metadata 'id' and no id"):
        compressor.compress_documents([documents[0], Document(page_content="no id")], QUERY)
    with pytest.raises(MissingIdsError, match="'elsewhere'"):
        compressor.compress_documents([Document(page_content="x", id="elsewhere")], QUERY)
    for wrong in ({"top_n": 0}, {"topn": 3}):
        with pytest.raises(ValidationError):
            KaLMCompressor(reranker=reranker, **wrong)


def test_unknown_documents_can_be_dropped_or_ranked_last(reranker, documents):
    unknown = Document(page_content="new", id="new")
    given = [documents[0], unknown, *documents[1:]]
    with pytest.raises(MissingIdsError, match=r"as id_key \(now 'id'\), or .*on_missing='drop'"):
        KaLMCompressor(reranker=reranker).compress_documents(given, QUERY)
    dropped = KaLMCompressor(reranker=reranker, on_missing="drop")
    assert dropped.compress_documents(given, QUERY) == KaLMCompressor(
        reranker=reranker
    ).compress_documents(documents, QUERY)
    last = KaLMCompressor(reranker=reranker, on_missing="last").compress_documents(given, QUERY)
    assert (last[-1].id, last[-1].metadata["relevance_score"]) == ("new", 0.0)
    keyed = [Document(page_content="", id="uuid", metadata={"pid": "p1"})]  # the other remedy
    assert KaLMCompressor(reranker=reranker, id_key="pid").compress_documents(keyed, QUERY)


def test_a_cascade_shows_the_ratio_and_the_relevance_never_rises(reranker, documents):
    staged = KaLMCompressor(reranker=reranker, cascade=[(8, 2), (2, None)])
    found = [d.metadata for d in staged.compress_documents(documents, QUERY)]
    assert [m["relevance_ratio"] for m in found] == [2, 2, 8, 8, 8]
    scores = [m["relevance_score"] for m in found]
    assert scores == sorted(scores, reverse=True)
    plain = KaLMCompressor(reranker=reranker).compress_documents(documents, QUERY)
    assert "relevance_ratio" not in plain[0].metadata


def test_paths_and_integer_ids_are_taken(small_table):
    documents = [Document(page_content="", metadata={"id": "p1"})]
    assert KaLMCompressor(reranker=small_table).compress_documents(documents, QUERY)
    with pytest.raises(InputError, match="is not an id"):
        KaLMCompressor(reranker=small_table).compress_documents(
            [Document(page_content="", metadata={"id": 1.5})], QUERY
        )
    with pytest.raises(MissingIdsError, match="'1'"):  # the id is an integer that is not stored
        KaLMCompressor(reranker=small_table).compress_documents(
            [Document(page_content="", metadata={"id": 1})], QUERY
        )
    with pytest.raises(InputError, match="ratio 3 is not a multiple"):
        KaLMCompressor(reranker=small_table, ratio=3)
