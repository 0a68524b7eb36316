"""Clients that send texts get the stored states of those that the table holds."""

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from kalm_encoder import PassageTable
from kalm_encoder.errors import InputError
from kalm_encoder.service.app import create_app
from kalm_encoder.service.live import open_live
from kalm_encoder.service.settings import Settings
from tests.conftest import make_texts
from tests.support.serving import wait_until

TEXTS = make_texts(60)[:8]
NEW = "a text that nobody stored"


@pytest.fixture(scope="module", params=["with encoder", "alone", "tei"])
def client(small_table, request):
    how = {"with_encoder": request.param == "with encoder", "tei": request.param == "tei"}
    settings = Settings(str(small_table), match_text=True, **how)
    with TestClient(create_app(settings)) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        client.settings = settings
        yield client


@pytest.fixture(scope="module")
def expected(client, small_table):
    """The scores of the same passages, asked for by id."""
    ids = PassageTable.open(small_table, match_text=True).ids_by_text(TEXTS)
    ask = {"query": "token", "document_ids": [ids[text] for text in TEXTS]}
    results = client.post("/v1/rerank", json=ask).json()["results"]
    return {TEXTS[r["index"]]: r["relevance_score"] for r in results}


def counts(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    (one,) = (family for family in families if family.name == "kalm_match_texts")
    return {s.labels["found"]: s.value for s in one.samples if s.name.endswith("_total")}


def test_a_stored_text_scores_as_its_id_on_every_route(client, expected):
    ask = {"query": "token", "documents": TEXTS}
    paths = ["/v1/rerank", "/v2/rerank"]
    if client.settings.tei:
        answer = client.post("/rerank", json={"query": "token", "texts": TEXTS}).json()
        assert {TEXTS[r["index"]]: r["score"] for r in answer} == expected
    else:
        paths.append("/rerank")
    for path in paths:
        results = client.post(path, json=ask).json()["results"]
        assert {TEXTS[r["index"]]: r["relevance_score"] for r in results} == expected
        assert all(r["stored"] is True for r in results)
    for path in ("/score", "/v1/score"):
        data = client.post(path, json={"text_1": "token", "text_2": TEXTS}).json()["data"]
        assert {TEXTS[r["index"]]: r["score"] for r in data} == expected


def test_each_result_says_whether_it_came_from_the_store(client):
    before = counts(client)
    named = {"id": "mine", "text": TEXTS[1], "lang": "en"}
    documents = [TEXTS[0], NEW, named, {"id": "p3", "text": NEW}, {"text": TEXTS[0] + "."}]
    ask = {"query": "token", "documents": documents, "return_documents": True}
    reply = client.post("/v1/rerank", json=ask | {"on_missing": "last"})
    results = {r["index"]: r for r in reply.json()["results"]}
    assert {i: r["stored"] for i, r in results.items()} == {
        0: True, 1: False, 2: True, 3: True, 4: False,
    }  # fmt: skip
    encoded = client.settings.with_encoder
    assert {i for i, r in results.items() if r["ratio"] is None} == (set() if encoded else {1, 4})
    assert results[2]["id"] == "mine"
    assert results[2]["document"]["text"] == TEXTS[1]
    assert "id" not in results[0]
    after = counts(client)
    assert {kind: after[kind] - before.get(kind, 0) for kind in after} == {"yes": 2, "no": 2}


def test_other_texts_go_to_the_encoder_or_are_refused(client):
    for path in ("/v2/rerank", "/score"):
        ask = {"query": "token", "text_1": "token", "documents": [TEXTS[0], NEW, NEW]}
        reply = client.post(path, json=ask)
        assert reply.status_code == (200 if client.settings.with_encoder else 422)
        if reply.status_code == 422:
            assert "1 candidates are texts without stored states ('a text" in reply.json()["error"]
    kept = client.post("/v2/rerank", json=ask | {"on_missing": "drop"}).json()["results"]
    assert {r["index"] for r in kept} == ({0, 1, 2} if client.settings.with_encoder else {0})


def test_a_table_that_cannot_be_indexed_is_refused_before_a_model_is_loaded(small_table):
    with pytest.raises(InputError, match=r"give --index-mb 1 .*, or leave --match-text out"):
        open_live(Settings(str(small_table), match_text=True, index_bytes=100))
