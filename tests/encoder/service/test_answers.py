"""Answers while the live version moves on: a request ends on the version it began with."""

import gc
import threading
import weakref

import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.service import answers
from kalm_encoder.service.live import LiveTable, open_live
from kalm_encoder.service.requests import RerankRequest, ScoreRequest
from kalm_encoder.service.settings import Settings
from kalm_encoder.table.location import Location
from pipeline.run.job import EncodeJob
from pipeline.table.publish import publish
from pipeline.upkeep.sync import sync
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.random_model import make_checkpoint
from tests.support.serving import wait_until


@pytest.fixture
def moving(model_dir, tmp_path, monkeypatch):
    """A live table whose version changes right after each query is scored; its old table."""
    corpus, uri = tmp_path / "c.jsonl", tmp_path / "t.lance"
    encode_table(model_dir, write_corpus(corpus, make_texts(5)), uri)
    old = PassageTable.open(str(uri))
    live = LiveTable(Settings(str(uri), refresh_s=1000))
    live.load()
    write_corpus(corpus, ["another text", *make_texts(5)[1:]])
    sync(EncodeJob(inputs=(str(corpus),), uri=str(uri), model=str(model_dir)), in_process)
    real = answers.score_candidates

    def score_candidates(*arguments):
        found = real(*arguments)
        live._take_over(PassageTable.open(str(uri)))
        return found

    monkeypatch.setattr(answers, "score_candidates", score_candidates)
    yield live, old
    live.close()


def test_texts_come_from_the_version_that_was_scored(moving):
    live, _ = moving
    request = RerankRequest(query="q", document_ids=["p0"], return_documents=True)
    for text in (make_texts(5)[0], "another text"):
        (result,) = answers.rerank(live.current, request)["results"]
        assert result["document"]["text"] == text


def test_all_queries_of_a_request_are_scored_from_one_version(moving):
    live, old = moving
    data = answers.score(live.current, ScoreRequest(queries=["q", "r"], document_ids=["p0", "p0"]))
    reranker = Reranker(old, live.current.reranker.decoder)
    for datum, query in zip(data["data"], ("q", "r"), strict=True):
        right = reranker.rerank(query, ["p0"])[0].score
        assert datum["score"] == pytest.approx(right, abs=1e-6)
    assert live.current.table.version != old.version


def test_tokens_are_those_of_the_prompts(moving):
    live, _ = moving
    request = RerankRequest(query="token state", document_ids=["p0", "p1", "p1"])
    tokens = answers.rerank(live.current, request)["usage"]["prompt_tokens"]
    assert tokens == 2 * len(live.current.decoder.prompt("token state").ids)


def test_an_old_model_is_freed_when_the_last_request_lets_go(model_dir, tmp_path):
    def device_threads():
        return sum(t.name.startswith("kalm-device") for t in threading.enumerate())

    corpus, uri = write_corpus(tmp_path / "c.jsonl", make_texts(5)), tmp_path / "t.lance"
    encode_table(model_dir, corpus, uri)
    before = device_threads()
    live = LiveTable(Settings(str(uri), refresh_s=1000))
    live.load()
    version = live.current
    old = weakref.ref(version.decoder)
    encode_table(
        make_checkpoint(tmp_path / "other", make_texts(5), seed=7), corpus, uri, new_generation=True
    )
    publish(Location(str(uri)))
    live._take_over(open_live(live.settings))
    assert live.current.decoder.files.fingerprint != version.decoder.files.fingerprint
    assert len(version.reranker.rerank("q", ["p0", "p1"])) == 2
    assert device_threads() == before + 2
    del version
    gc.collect()
    assert old() is None
    wait_until(lambda: device_threads() == before + 1)
    live.close()
    assert device_threads() == before
