"""Answers while the live version moves on: a request ends on the version it began with."""

import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.service import answers
from kalm_encoder.service.engine import Engine
from kalm_encoder.service.live import LiveTable, Settings
from kalm_encoder.service.shapes import RerankRequest, ScoreRequest
from pipeline.run.job import EncodeJob
from pipeline.upkeep.sync import sync
from pipeline.workers.local import encode_inline
from tests.conftest import encode_table, make_texts, write_corpus


@pytest.fixture
def moving(model_dir, tmp_path, monkeypatch):
    """An engine whose live version changes right after each query is scored; its old table."""
    corpus, uri = tmp_path / "c.jsonl", tmp_path / "t.lance"
    encode_table(model_dir, write_corpus(corpus, make_texts(5)), uri)
    old = PassageTable.open(str(uri))
    live = LiveTable(Settings(str(uri), refresh_s=1000))
    live.load()
    write_corpus(corpus, ["another text", *make_texts(5)[1:]])
    sync(EncodeJob(inputs=(str(corpus),), uri=str(uri), model=str(model_dir)), encode_inline)
    engine = Engine(live)
    real = engine.rerank

    def rerank(*arguments):
        found = real(*arguments)
        live._take_over(PassageTable.open(str(uri)))
        return found

    monkeypatch.setattr(engine, "rerank", rerank)
    yield engine, old
    live.close()


def test_texts_come_from_the_version_that_was_scored(moving):
    engine, _ = moving
    request = RerankRequest(query="q", document_ids=["p0"], return_documents=True)
    for text in (make_texts(5)[0], "another text"):
        (result,) = answers.rerank(engine, request)["results"]
        assert result["document"]["text"] == text


def test_all_queries_of_a_request_are_scored_from_one_version(moving):
    engine, old = moving
    data = answers.score(engine, ScoreRequest(queries=["q", "r"], document_ids=["p0", "p0"]))
    reranker = Reranker(old, engine.live.current.decoder)
    for datum, query in zip(data["data"], ("q", "r"), strict=True):
        right = reranker.rerank(query, ["p0"])[0].score
        assert datum["score"] == pytest.approx(right, abs=1e-6)
    assert engine.live.current.table.version != old.version


def test_tokens_are_those_of_the_prompts(moving):
    engine, _ = moving
    request = RerankRequest(query="token state", document_ids=["p0", "p1", "p1"])
    tokens = answers.rerank(engine, request)["usage"]["prompt_tokens"]
    assert tokens == 2 * len(engine.live.current.decoder.prompt("token state").ids)
