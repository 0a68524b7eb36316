"""What the explore page is told: over HTTP by a real service, and refused before one starts."""

import pytest
from fastapi.testclient import TestClient

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.errors import InputError
from kalm_encoder.rerank.fusion import fuse
from kalm_encoder.service.app import create_app
from kalm_encoder.service.explore.comparing import Explorer
from kalm_encoder.service.explore.tables import cascades, open_tables, ratio_steps
from kalm_encoder.service.live import LiveTable
from kalm_encoder.service.requests import ExploreRequest
from kalm_encoder.service.settings import Settings
from pipeline.upkeep.truncate import truncate
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.random_model import make_checkpoint
from tests.support.serving import serving

QUERY = "token state"
TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def int8_table(small_table, tmp_path_factory):
    uri = tmp_path_factory.mktemp("int8") / "int8.lance"
    truncate(str(small_table), str(uri), store_dtype="int8")
    return uri


@pytest.fixture(scope="module")
def other_table(tmp_path_factory):
    """The same passages, encoded by another model."""
    folder = tmp_path_factory.mktemp("other")
    model = make_checkpoint(folder / "model", TEXTS, seed=7)
    corpus = write_corpus(folder / "c.jsonl", TEXTS)
    encode_table(model, corpus, folder / "t.lance", ratios=(2, 8))
    return folder / "t.lance"


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


@pytest.fixture(scope="module")
def client(small_table, int8_table):
    arguments = (str(int8_table), "--note", "random weights")
    with serving(small_table, *arguments, command="explore") as client:
        yield client


def search(client, **asked):
    reply = client.post("/explore/search", json={"query": QUERY, "k": 30, **asked})
    assert reply.status_code == 200, reply.text
    return reply.json()


def state_bytes(table, ids, ratio):
    passages = table.take(ids, ratio=ratio)
    return sum(len(p.states) for p in passages) * table.spec.bytes_per_state


def test_both_rankings_are_those_of_the_library(client, reranker):
    answer = search(client, ratio=8)
    first = reranker.table.search(QUERY, 30)
    assert [(r["id"], r["score"]) for r in answer["first"]] == first
    offline = {r.id: r for r in reranker.rerank(QUERY, [i for i, _ in first], ratio=8)}
    assert {r["id"] for r in answer["reranked"]} == offline.keys()
    for got in answer["reranked"]:
        assert abs(got["score"] - offline[got["id"]].score) <= 1e-5
        assert abs(got["margin"] - offline[got["id"]].margin) <= 1e-4
        assert got["ratio"] == 8
    fused = fuse(dict(first), {r["id"]: r["margin"] for r in answer["reranked"]})
    assert {r["id"]: r["score"] for r in answer["fused"]} == pytest.approx(fused)


@pytest.mark.parametrize("ranking", ["reranked", "fused"])
def test_movement_counts_places_from_the_first_stage(client, ranking):
    answer = search(client)
    before = [r["id"] for r in answer["first"]]
    scores = [r["score"] for r in answer[ranking]]
    assert scores == sorted(scores, reverse=True)
    assert any(r["movement"] for r in answer[ranking])
    for place, result in enumerate(answer[ranking]):
        assert before[place + result["movement"]] == result["id"]


def test_bytes_are_those_of_the_column_that_is_read(client, reranker):
    ids = [r["id"] for r in search(client)["first"]]
    fine, coarse = (state_bytes(reranker.table, ids, ratio) for ratio in (2, 8))
    for ratio, read in ((None, fine), (2, fine), (4, fine), (8, coarse), (16, coarse)):
        answer = search(client, ratio=ratio)
        assert answer["bytes"] == {"read": read, "finest": fine}, ratio
    passages = reranker.table.take(ids, ratio=16)
    assert answer["states"] == sum(len(p.states) for p in passages)
    assert all(ms > 0 for ms in answer["ms"].values())


def test_a_cascade_reads_all_coarsely_and_the_best_again(client, reranker):
    answer = search(client, cascade=[[8, 10], [2, None]])
    assert [r["ratio"] for r in answer["reranked"]] == [2] * 10 + [8] * (len(answer["first"]) - 10)
    ids = [r["id"] for r in answer["reranked"]]
    read = state_bytes(reranker.table, ids, 8) + state_bytes(reranker.table, ids[:10], 2)
    assert answer["bytes"]["read"] == read
    fine = {r["id"]: r["margin"] for r in answer["reranked"][:10]}
    fused = fuse({r["id"]: r["score"] for r in answer["first"]}, fine)
    assert {r["id"]: r["score"] for r in answer["fused"]} == pytest.approx(fused)


def test_a_table_of_another_dtype_is_read_with_the_same_decoder(client, int8_table):
    exact, small = search(client), search(client, table="int8")
    assert (exact["table"], small["table"]) == ("float32", "int8")
    scores = {r["id"]: r["score"] for r in exact["reranked"]}
    changes = [abs(r["score"] - scores[r["id"]]) for r in small["reranked"]]
    assert 0 < max(changes) < 5e-3
    ids = list(scores)
    table = PassageTable.open(str(int8_table))
    assert small["bytes"]["read"] == state_bytes(table, ids, 2)
    assert small["bytes"]["read"] < exact["bytes"]["read"] / 3


def test_passages_come_with_their_beginning_and_whole_on_demand(client):
    answer = search(client)
    assert any(not p["whole"] for p in answer["passages"].values())
    for result in answer["first"]:
        shown, text = answer["passages"][result["id"]], TEXTS[int(result["id"][1:])]
        assert text.startswith(shown["text"])
        assert shown["whole"] == (shown["text"] == text)
        assert shown["truncated"] is False
    whole = client.post("/explore/passage", json={"id": "p7", "table": "int8"}).json()
    assert whole == {"id": "p7", "text": TEXTS[7]}
    missing = client.post("/explore/passage", json={"id": "nope"})
    assert (missing.status_code, missing.json()["missing_ids"]) == (422, ["nope"])


def test_a_query_that_no_text_holds_is_answered(client):
    answer = search(client, query="zyzzyva (\"* AND'")
    assert (answer["first"], answer["reranked"], answer["fused"]) == ([], [], [])


def test_about_says_what_there_is_and_no_paths(client, small_table):
    reply = client.get("/explore/about")
    about = reply.json()
    assert about["note"] == "random weights"
    assert [t["name"] for t in about["tables"]] == ["float32", "int8"]
    assert about["tables"][1] | {"version": 0} == {
        "name": "int8",
        "store_dtype": "int8",
        "rows": 60,
        "version": 0,
        "stored": [2, 8],
        "ratios": [2, 4, 8, 16, 32, 64, 128],
        "cascades": [[[16, 10], [2, None]], [[16, 20], [2, None]], [[64, 50], [16, 20], [2, None]]],
    }
    assert str(small_table.parent) not in reply.text


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"table": "int2"}, "no table 'int2' here: give one of float32, int8"),
        ({"ratio": 3}, "ratio 3 is not a multiple of a stored ratio (2, 8)"),
        ({"ratio": 8, "cascade": [[8, 1], [2, None]]}, "ratio or cascade, not both"),
        ({"cascade": []}, "must go from coarse to fine"),
        ({"cascade": [[2, 1], [8, None]]}, "must go from coarse to fine"),
        ({"k": 1001}, "1001 candidates, at most 1000"),
        ({"k": 0}, "body.k"),
        ({"query": ""}, "body.query"),
    ],
)
def test_impossible_questions_are_named(client, asked, says):
    reply = client.post("/explore/search", json={"query": QUERY} | asked)
    assert reply.status_code == 422
    assert says in reply.json()["message"]
    assert "/" not in reply.json()["message"]


def test_the_service_is_there_too(client):
    answer = client.post("/rerank", json={"query": QUERY, "document_ids": ["p1", "p2"]})
    assert len(answer.json()["results"]) == 2


def app(table, *, key=None, page=True):
    """Return a client of the application, nothing loaded."""
    explorer = Explorer(open_tables([str(table)])) if page else None
    return TestClient(create_app(Settings(str(table), keys={key: None} if key else {}), explorer))


def test_the_page_may_load_nothing_from_elsewhere_and_run_nothing_inline(small_table):
    for path in ("/", "/explore.js", "/explore.css", "/icon.svg"):
        reply = app(small_table).get(path)
        assert reply.status_code == 200
        assert "default-src 'self'" in reply.headers["Content-Security-Policy"]
        assert "http://" not in reply.text.replace("http://www.w3.org/", "")
        assert "https://" not in reply.text
    assert app(small_table).get("/%2e%2e/app.py").status_code == 404
    assert app(small_table).get("/made/up").json()["message"] == "Not Found"


def test_a_key_guards_the_data_and_not_the_page(small_table):
    client = app(small_table, key="s3cret")
    assert client.get("/").status_code == 200
    for reply in (
        client.get("/explore/about"),
        client.post("/explore/search", json={"query": "q"}),
        client.post("/explore/passage", json={"id": "p1"}),
    ):
        assert reply.status_code == 401


def test_the_plain_service_has_no_page(small_table):
    client = app(small_table, page=False)
    assert client.get("/").status_code == 404
    assert client.post("/explore/search", json={"query": "q"}).status_code == 404


def test_tables_are_named_by_what_tells_them_apart(small_table, tmp_path):
    coarse = str(tmp_path / "coarse.lance")
    truncate(str(small_table), coarse, ratios=(8,))
    assert list(open_tables([str(small_table)])) == ["float32"]
    assert list(open_tables([str(small_table), coarse])) == ["float32 at 2, 8", "float32 at 8"]


def test_tables_that_do_not_belong_together_are_refused(small_table, other_table, model_dir):
    small, other = str(small_table), str(other_table)
    with pytest.raises(InputError, match=f"{small} has fingerprint .*{other} .* of one model"):
        open_tables([small, other])
    with pytest.raises(InputError, match="both store float32 at 2, 8: give one of them"):
        open_tables([small, small])
    silent = other_table.parent / "silent.lance"
    corpus = write_corpus(silent.with_suffix(".jsonl"), TEXTS[:3])
    encode_table(model_dir, corpus, silent, keep_text=False)
    with pytest.raises(InputError, match="stores no text to search"):
        open_tables([str(silent)])


def test_a_live_version_of_another_model_is_not_asked(small_table, other_table):
    live = LiveTable(Settings(str(small_table)))
    live.load()
    try:
        explorer = Explorer(open_tables([str(other_table)]))
        with pytest.raises(InputError, match="another model than the tables shown"):
            explorer.search(live.current, ExploreRequest(query=QUERY))
    finally:
        live.close()


def test_what_the_page_offers():
    assert ratio_steps((4, 32)) == [4, 8, 16, 32, 64, 128]
    assert ratio_steps((1, 12)) == [1, 2, 4, 8, 12, 16, 32, 64, 128]
    assert ratio_steps((256,)) == [256]
    assert cascades((4, 32)) == [
        [(32, 10), (4, None)],
        [(32, 20), (4, None)],
        [(128, 50), (32, 20), (4, None)],
    ]
    assert cascades((32,)) == [[(128, 10), (32, None)], [(128, 20), (32, None)]]
    assert cascades((128,)) == []
