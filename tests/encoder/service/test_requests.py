"""What requests mean: which passage a document is, what is returned, and what is missing."""

import json

import pytest
from pydantic import ValidationError

from kalm_encoder import Reranker
from kalm_encoder.errors import InputError, MissingIdsError
from kalm_encoder.service import answers
from kalm_encoder.service.live import LiveTable
from kalm_encoder.service.requests import RerankRequest, ScoreRequest, TeiRequest
from kalm_encoder.service.settings import Settings
from tests.conftest import encode_table, make_texts, write_corpus

TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def live(small_table):
    live = LiveTable(Settings(str(small_table), with_encoder=True, refresh_s=1000))
    live.load()
    yield live
    live.close()


@pytest.fixture(scope="module")
def ask(live):
    """Answer the JSON of a request, as /rerank does."""
    return lambda **fields: answers.rerank(
        live.current, RerankRequest.model_validate({"query": "token state"} | fields)
    )["results"]


def scores(results):
    return {result["index"]: result["relevance_score"] for result in results}


def test_what_was_scored_is_what_is_returned(ask):
    documents = [
        {"id": "p1", "text": "Banana bread"},
        {"id": "p2"},
        {"id": "elsewhere", "text": "Banana bread"},
        "Banana bread",
    ]
    results = ask(documents=documents, return_documents=True)
    returned = {result["index"]: result["document"]["text"] for result in results}
    assert returned == {0: TEXTS[1], 1: TEXTS[2], 2: "Banana bread", 3: "Banana bread"}
    alone = ask(documents=[TEXTS[1], TEXTS[2], "Banana bread", "Banana bread"])
    assert scores(results) == pytest.approx(scores(alone), abs=1e-4)
    ids = {result["index"]: result.get("id") for result in results}
    assert ids == {0: "p1", 1: "p2", 2: "elsewhere", 3: None}


def test_a_table_without_texts_returns_no_other_text(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", TEXTS[:3])
    encode_table(model_dir, corpus, tmp_path / "t.lance", keep_text=False)
    live = LiveTable(Settings(str(tmp_path / "t.lance"), refresh_s=1000))
    live.load()
    document = {"id": "p1", "text": "Banana bread"}
    request = RerankRequest(query="q", documents=[document], return_documents=True)
    (result,) = answers.rerank(live.current, request)["results"]
    live.close()
    assert result["id"] == "p1" and "document" not in result


def test_one_unknown_id_with_two_texts_is_two_candidates(ask):
    documents = [{"id": "x", "text": TEXTS[1]}, {"id": "x", "text": TEXTS[2]}]
    got = ask(documents=documents, return_documents=True)
    assert scores(got) == pytest.approx(scores(ask(documents=TEXTS[1:3])), abs=1e-6)
    assert {r["index"]: r["document"]["text"] for r in got} == {0: TEXTS[1], 1: TEXTS[2]}


@pytest.fixture(scope="module")
def numbered(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbered")
    corpus = write_corpus(folder / "c.jsonl", TEXTS[:20], prefix="")
    encode_table(model_dir, corpus, folder / "t.lance")
    live = LiveTable(Settings(str(folder / "t.lance"), refresh_s=1000))
    live.load()
    yield live.current
    live.close()


@pytest.mark.parametrize("documents", ["document_ids", "documents"])
def test_an_integer_id_is_its_decimal_string(numbered, documents):
    given = {
        "document_ids": [7, "3", 12],
        "documents": [{"id": 7}, {"id": "3", "text": "x"}, {"id": 12, "text": "y"}],
    }[documents]
    body = json.dumps({"query": "q", documents: given})
    results = answers.rerank(numbered, RerankRequest.model_validate_json(body))["results"]
    assert {r["index"]: r["id"] for r in results} == {0: "7", 1: "3", 2: "12"}
    body = json.dumps({"queries": "q", documents: given})
    data = answers.score(numbered, ScoreRequest.model_validate_json(body))["data"]
    assert {d["index"]: d["score"] for d in data} == pytest.approx(scores(results), abs=1e-6)


@pytest.mark.parametrize("bad", [1.5, True, [1], {"id": True}, {"id": 1.0}])
def test_other_ids_are_refused(bad):
    with pytest.raises(ValidationError):
        RerankRequest(
            query="q", **{"documents" if isinstance(bad, dict) else "document_ids": [bad]}
        )


def test_rank_fields_make_the_text(ask):
    documents = [
        {"title": "token", "body": TEXTS[1], "year": 1999, "id": 900001},
        {"title": None, "body": TEXTS[2]},
        "a plain text",
    ]
    got = ask(documents=documents, rank_fields=["title", "body"], return_documents=True)
    texts = [f"token {TEXTS[1]}", TEXTS[2], "a plain text"]
    assert scores(got) == pytest.approx(scores(ask(documents=texts)), abs=1e-5)
    assert {r["index"]: r["document"]["text"] for r in got} == dict(enumerate(texts))
    with pytest.raises(InputError, match=r"documents\[0\]: a field in rank_fields does not hold a"):
        ask(documents=documents, rank_fields=["year"])
    with pytest.raises(InputError, match=r"documents\[1\] has neither .* in the field title"):
        ask(documents=documents, rank_fields=["title"])
    with pytest.raises(
        InputError, match=r"documents\[1\] has neither .* name the fields of its te"
    ):
        ask(documents=documents)
    stored = {"id": "p3", "title": "ignored, as the id is stored"}
    (result,) = ask(documents=[stored], rank_fields=["title"], return_documents=True)
    assert result["document"]["text"] == TEXTS[3]


def test_equal_texts_score_once_and_tie_by_position(live, ask):
    documents = ["same text"] * 12 + [{"id": f"x{n}", "text": "same text"} for n in range(12)]
    results = ask(documents=documents)
    assert [result["index"] for result in results] == list(range(24))
    assert len(set(scores(results).values())) == 1
    request = TeiRequest(query="token state", texts=["same text"] * 12)
    assert [row["index"] for row in answers.tei(live.current, request)] == list(range(12))
    tokens = answers.rerank(live.current, RerankRequest(query="token state", documents=documents))[
        "usage"
    ]["prompt_tokens"]
    assert tokens == len(live.current.decoder.prompt("token state").ids)


def test_one_unknown_id_need_not_fail_the_query(ask, live, small_table):
    ids = ["nowhere", "p1", "p2", 404, "p3"]
    with pytest.raises(MissingIdsError) as caught:
        ask(document_ids=ids)
    assert caught.value.ids == ["nowhere", "404"]
    dropped = ask(document_ids=ids, on_missing="drop")
    assert {r["index"] for r in dropped} == {1, 2, 4}
    offline = {r.id: r.score for r in Reranker.open(str(small_table)).rerank("token state", ids,
               on_missing="drop")}  # fmt: skip
    assert {r["id"]: r["relevance_score"] for r in dropped} == pytest.approx(offline, abs=1e-5)
    last = ask(document_ids=ids, on_missing="last", raw_scores=True, return_documents=True)
    assert [r["index"] for r in last][3:] == [0, 3]
    for result in last[3:]:
        assert result["relevance_score"] == 0.0
        assert result["ratio"] is None and result["margin"] is None and "document" not in result
    json.dumps(last, allow_nan=False)
    assert len(ask(document_ids=ids, on_missing="last", top_n=4)) == 4
    for on_missing, count in (("drop", 3), ("last", 5)):
        request = ScoreRequest(queries="q", document_ids=ids, on_missing=on_missing)
        assert len(answers.score(live.current, request)["data"]) == count
    with pytest.raises(ValidationError, match="on_missing"):
        ask(document_ids=ids, on_missing="ignore")
