"""The service as its clients see it: a real process, real HTTP."""

import contextlib
import shutil
import signal
import threading

import cohere
import httpx
import pytest

from kalm_encoder import PassageTable, Reranker
from kalm_encoder.table.location import Location
from kalm_encoder.table.row_index import RowIndex
from pipeline.run.job import EncodeJob
from pipeline.table.publish import publish, rollback
from pipeline.upkeep.sync import sync
from pipeline.workers.local import in_process
from tests.conftest import encode_table, make_texts, write_corpus
from tests.support.commands import HANG_S
from tests.support.random_model import make_checkpoint
from tests.support.serving import serving, wait_until

IDS = [f"p{i}" for i in range(60)]
TEXTS = make_texts(60)


@pytest.fixture(scope="module")
def reranker(small_table):
    return Reranker.open(str(small_table))


@pytest.fixture(scope="module")
def client(small_table, tmp_path_factory):
    with serving(
        small_table,
        *("--disk-cache", tmp_path_factory.mktemp("cache"), "--disk-cache-gb", "0.1"),
        *("--with-encoder", "--filter-columns", "id,num_tokens", "--hot-mb", "64"),
        *("--max-candidates", "100", "--max-body-mb", "1"),
    ) as client:
        yield client


@pytest.fixture(scope="module")
def plain(small_table):
    with serving(small_table, "--tei", "--index-mb", "0", KALM_API_KEY="s3cret") as client:
        client.headers["Authorization"] = "Bearer s3cret"
        yield client


def expected(reranker, ids, **options):
    return {r.id: r.score for r in reranker.rerank("token state", ids, **options)}


def test_stored_ids_score_as_offline(client, reranker):
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        answer = client.post(path, json={"query": "token state", "document_ids": IDS}).json()
        scores = expected(reranker, IDS)
        assert len(answer["results"]) == 60
        for result in answer["results"]:
            assert result["id"] == IDS[result["index"]]
            assert abs(result["relevance_score"] - scores[result["id"]]) <= 1e-5
        ranked = [r["relevance_score"] for r in answer["results"]]
        assert ranked == sorted(ranked, reverse=True)


def test_options_reach_the_reranker(client, reranker):
    ask = {"query": "token state", "document_ids": IDS}
    for ours, offline in (
        ({"instruct": "Find duplicates."}, {"instruction": "Find duplicates."}),
        ({"system_instruction": "Judge it."}, {"system_instruction": "Judge it."}),
        ({"ratio": 16}, {"ratio": 16}),
        ({"cascade": [[8, 5], [2, None]]}, {"cascade": [(8, 5), (2, None)]}),
    ):
        answer = client.post("/rerank", json=ask | ours | {"top_n": 7}).json()
        wanted = reranker.rerank("token state", IDS, **offline)
        scores = {r.id: r.score for r in wanted}
        assert [r["ratio"] for r in answer["results"]] == [r.ratio for r in wanted[:7]]
        for got, right in zip(answer["results"], wanted[:7], strict=True):
            assert abs(got["relevance_score"] - scores[got["id"]]) <= 1e-5
            assert abs(got["relevance_score"] - right.score) <= 1e-5  # near ties may change places
    raw = client.post("/rerank", json=ask | {"raw_scores": True}).json()["results"][0]
    assert abs(raw["margin"] - reranker.rerank("token state", IDS)[0].margin) <= 1e-4


def test_a_repeated_candidate_is_answered_at_each_place(client):
    ask = {"query": "q", "document_ids": ["p1", "p2", "p1"]}
    results = client.post("/rerank", json=ask).json()["results"]
    assert sorted(r["index"] for r in results) == [0, 1, 2]
    scores = {r["index"]: r["relevance_score"] for r in results}
    assert scores[0] == scores[2]
    assert len(client.post("/rerank", json=ask | {"top_n": 2}).json()["results"]) == 2
    assert len(client.post("/rerank", json=ask | {"top_n": 0}).json()["results"]) == 3


def test_texts_are_encoded_live_and_score_like_stored_ones(client, reranker):
    scores = expected(reranker, IDS[:9])
    documents = [
        *TEXTS[:3],
        *({"text": t} for t in TEXTS[3:6]),
        *({"id": i, "text": "not what is stored"} for i in IDS[6:8]),
        {"id": "elsewhere", "text": TEXTS[8]},
    ]
    ask = {"query": "token state", "documents": documents, "return_documents": True}
    answer = client.post("/rerank", json=ask).json()
    for result in answer["results"]:
        assert abs(result["relevance_score"] - scores[f"p{result['index']}"]) <= 1e-4
        assert (
            result.get("id") == (documents[result["index"]] or {}).get("id")
            if isinstance(documents[result["index"]], dict)
            else "id" not in result
        )
    by_place = {r["index"]: r["document"]["text"] for r in answer["results"]}
    assert by_place[0] == TEXTS[0]
    assert by_place[6] == TEXTS[6], "what was scored is what is returned"


def test_a_text_named_like_a_stored_passage_is_still_the_text(client, reranker):
    ask = {"query": "token state", "documents": [TEXTS[5], {"id": "document 0", "text": TEXTS[6]}]}
    results = client.post("/rerank", json=ask).json()["results"]
    scores = expected(reranker, ["p5", "p6"])
    for result in results:
        assert abs(result["relevance_score"] - scores[f"p{5 + result['index']}"]) <= 1e-4


def test_stored_texts_come_back_when_asked_for(client):
    ask = {"query": "q", "document_ids": ["p3", "p4"], "return_documents": True}
    for result in client.post("/v1/rerank", json=ask).json()["results"]:
        assert result["document"]["text"] == TEXTS[3 + result["index"]]


def test_scores_come_in_the_order_of_the_request(client, reranker):
    one = client.post("/score", json={"text_1": "token state", "document_ids": IDS[:5]}).json()
    scores = expected(reranker, IDS[:5])
    assert [d["index"] for d in one["data"]] == [0, 1, 2, 3, 4]
    for datum in one["data"]:
        assert abs(datum["score"] - scores[IDS[datum["index"]]]) <= 1e-5
    pairs = {"queries": ["token state", "other", "token state"], "document_ids": ["p0", "p0", "p2"]}
    data = client.post("/v1/score", json=pairs).json()["data"]
    assert abs(data[0]["score"] - scores["p0"]) <= 1e-5
    assert abs(data[2]["score"] - scores["p2"]) <= 1e-5
    assert data[1]["score"] != data[0]["score"]
    wrong = client.post("/score", json={"queries": ["a", "b"], "document_ids": ["p0"]})
    assert wrong.status_code == 422


def test_unknown_ids_are_named(client):
    reply = client.post("/rerank", json={"query": "q", "document_ids": ["p1", "nope", "nor this"]})
    assert reply.status_code == 422
    assert reply.json()["missing_ids"] == ["nope", "nor this"]
    assert "/" not in reply.json()["message"]


def test_what_a_filter_drops_is_neither_scored_nor_revealed(client):
    def ids(predicate, *asked):
        ask = {"query": "q", "document_ids": asked, "filter": predicate}
        reply = client.post("/rerank", json=ask)
        assert reply.status_code == 200, reply.text
        return {r["id"] for r in reply.json()["results"]}

    assert ids("id = 'p1' OR id = 'p3'", *IDS, "unknown") == {"p1", "p3"}
    assert ids("num_tokens > 10 AND NOT id IN ('p1', 'it''s')", "p1", "unknown") == set()
    long = ids("num_tokens >= 40", *IDS)
    assert 0 < len(long) < 60
    texts = {"query": "q", "documents": ["text"], "filter": "id = 'p1'"}
    assert client.post("/rerank", json=texts).status_code == 422


@pytest.mark.parametrize(
    "predicate",
    [
        *("text LIKE '%a%'", "upper(id) = 'P1'", "id = 'p1') OR (1 = 1", "id = 'p1' --", ""),
        *("id = 'p1'; DROP TABLE x", "(" * 500 + "id = 'p1'" + ")" * 500, "NOT " * 200 + "TRUE"),
        *("id = 'unclosed", "_rowid IN (1)", "num_tokens > 'x'", "id IN (SELECT id)", "id('x')"),
    ],
)
def test_filters_beyond_what_is_allowed_are_refused(client, predicate):
    ask = {"query": "q", "document_ids": ["p1"], "filter": predicate}
    reply = client.post("/rerank", json=ask)
    assert reply.status_code == 422, reply.text
    assert "/" not in reply.json()["message"]


def test_limits(client):
    many = client.post("/rerank", json={"query": "q", "document_ids": ["p1"] * 101})
    assert many.status_code == 422
    assert "at most 100" in many.json()["message"]
    large = client.post("/rerank", content=b"x" * (1 << 20) + b"y")
    assert large.status_code == 413
    assert large.json()["error_type"] == "Overloaded"
    chunks = client.post("/rerank", content=(b"[" * 65536 for _ in range(40)))  # no Content-Length
    assert chunks.status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[" * 100_000,
        b'{"query": "\xff\xfe", "document_ids": ["p1"]}',
        b'{"query": "\\ud800", "document_ids": ["p1"]}',
        b'{"query": "q", "document_ids": ["p1"], "max_ms": NaN}',
        b'{"query": "q", "document_ids": ["p1"], "max_ms": 1e999}',
        b'{"query": "q", "document_ids": "p1"}',
        b'{"query": "q"}',
        b'{"query": "q", "documents": [], "document_ids": []}',
        b'{"query": "q", "documents": [{}]}',
        b'{"query": "q", "document_ids": ["p1"], "ratio": 3}',
        b'{"query": "q", "document_ids": ["p1"], "ratio": 99999999999999999999}',
        b'{"query": "q", "document_ids": ["p1"], "cascade": [[2, 1], [8, null]]}',
        b'{"query": "q", "document_ids": ["p1"], "top_n": -1}',
        b'{"query": "q", "document_ids": ["\' OR 1=1 --"]}',
        b"[]",
        b"null",
        b'{"query": "' + b"q" * 40_000 + b'", "document_ids": ["p1"]}',
    ],
)
def test_malformed_requests_get_a_message(client, body):
    reply = client.post("/rerank", content=body, headers={"Content-Type": "application/json"})
    assert 400 <= reply.status_code < 500, reply.text
    message = reply.json()["message"]
    assert message
    assert len(message) < 2000
    assert "Traceback" not in reply.text
    assert client.get("/health").status_code == 200


def test_tei_shape_key_and_no_encoder(plain):
    reply = plain.post("/rerank", json={"query": "q", "texts": ["some text"]})
    assert reply.status_code == 422
    assert "--with-encoder" in reply.json()["error"]
    assert "'some text'" in reply.json()["error"]
    assert plain.post("/v1/rerank", json={"query": "q", "document_ids": ["p1"]}).status_code == 200
    for key in ("", "Bearer wrong", "Bearer sch\u00fcssel", "s3cre"):
        denied = httpx.post(
            f"{plain.base_url}/v1/rerank",
            json={"query": "q", "document_ids": ["p1"]},
            headers={"Authorization": key.encode("utf-8")},
        )
        assert denied.status_code == 401
    assert httpx.get(f"{plain.base_url}/health").status_code == 200
    assert httpx.get(f"{plain.base_url}/metrics").status_code == 401
    assert "kalm_index_bytes 0.0" in plain.get("/metrics").text


def test_tei_answers_a_bare_list(small_table, reranker):
    with serving(small_table, "--tei", "--with-encoder") as client:
        ask = {"query": "token state", "texts": TEXTS[:4], "return_text": True}
        answer = client.post("/rerank", json=ask).json()
        scores = expected(reranker, IDS[:4])
        assert len(answer) == 4
        for result in answer:
            assert abs(result["score"] - scores[IDS[result["index"]]]) <= 1e-4
            assert result["text"] == TEXTS[result["index"]]


def test_coheres_client(client, reranker):
    api = cohere.ClientV2(api_key="none", base_url=str(client.base_url))
    answer = api.rerank(model="kalm", query="token state", documents=TEXTS[:5], top_n=3)
    scores = expected(reranker, IDS[:5])
    assert len(answer.results) == 3
    for result in answer.results:
        assert abs(result.relevance_score - scores[IDS[result.index]]) <= 1e-4


def test_info_and_metrics(client, small_table):
    info = client.get("/info").json()
    assert info["rows"] == 60
    assert info["ratios"] == [2, 8]
    assert str(small_table.parent) not in client.get("/info").text
    for _ in range(2):  # the second time from memory
        client.post("/rerank", json={"query": "q", "document_ids": ["p1"]})
    client.get("/made/up/path")
    text = client.get("/metrics").text
    assert 'kalm_requests_total{path="/rerank",status="200"}' in text
    assert "kalm_table_version" in text
    assert 'kalm_hot_lookups{found="yes"}' in text
    assert 'kalm_disk_cache_lookups{found="no"}' in text
    assert "kalm_disk_cache_bytes 1.25e+07" in text  # the segment that is written is reserved
    assert "made" not in text


def test_a_bad_table_or_column_fails_at_once(small_table, tmp_path):
    for arguments, says in (
        ([tmp_path / "none.lance"], "no passage table"),
        ([small_table, "--filter-columns", "lang"], "no column 'lang'"),
    ):
        with (
            pytest.raises(AssertionError, match=says),
            serving(*arguments, log=tmp_path / "log"),
        ):
            pass


def test_too_many_requests_are_refused_and_the_rest_answered(small_table):
    with serving(small_table, "--max-pending", "2", "--threads", "1") as client:
        replies = at_once(client, 12, {"query": "token", "document_ids": IDS})
        codes = sorted(r.status_code for r in replies)
        assert set(codes) == {200, 429}
        assert all(r.headers["Retry-After"] for r in replies if r.status_code == 429)
        assert client.post("/rerank", json={"query": "t", "document_ids": ["p1"]}).is_success


def test_a_request_that_takes_too_long_is_given_up(small_table):
    cascade = [[16, 60], [8, 60], [4, 60], [2, None]]
    ask = {"query": "token " * 500, "document_ids": IDS, "cascade": cascade}
    with serving(small_table, "--timeout-s", "0.2") as client:
        reply = client.post("/rerank", json=ask)
        assert reply.status_code == 504


def test_sigterm_answers_what_was_accepted(small_table, reranker, tmp_path):
    query = "token state " * 200  # long enough that all 16 are there before the first is done
    with serving(small_table, "--timeout-s", HANG_S, log=tmp_path / "log") as client:
        replies = []
        ask = {"query": query, "document_ids": IDS[:30]}
        thread = threading.Thread(target=lambda: replies.extend(at_once(client, 16, ask)))
        thread.start()
        wait_until(lambda: "kalm_pending_requests 16.0" in client.get("/metrics").text)
        client.process.send_signal(signal.SIGTERM)
        thread.join()
        assert client.process.wait(HANG_S) == 0
    scores = {r.id: r.score for r in reranker.rerank(query, IDS[:30])}
    assert [reply.status_code for reply in replies] == [200] * 16
    for reply in replies:
        for result in reply.json()["results"]:
            assert abs(result["relevance_score"] - scores[result["id"]]) <= 1e-5
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_live_tag_is_followed(model_dir, tmp_path):
    corpus = write_corpus(tmp_path / "c.jsonl", TEXTS[:20])
    table = tmp_path / "t.lance"
    encode_table(model_dir, corpus, table)
    with serving(table, "--refresh-s", "0.1", log=tmp_path / "log") as client:
        before = client.get("/info").json()["table_version"]
        assert f"kalm_index_bytes {RowIndex.size(20, (4,)):.1f}" in client.get("/metrics").text
        ask = {"query": "q", "document_ids": ["p0", "p20"]}
        assert client.post("/rerank", json=ask).status_code == 422
        write_corpus(corpus, TEXTS[:21])
        job = EncodeJob(inputs=(str(corpus),), uri=str(table), model=str(model_dir))
        sync(job, in_process)
        stop = threading.Event()
        codes = []

        def ask_on():
            while not stop.is_set():
                codes.append(
                    client.post("/rerank", json=ask | {"document_ids": ["p0"]}).status_code
                )

        thread = threading.Thread(target=ask_on)
        thread.start()
        wait_until(lambda: client.get("/info").json()["table_version"] != before)
        assert client.post("/rerank", json=ask).status_code == 200
        assert f"kalm_index_bytes {RowIndex.size(21, (4,)):.1f}" in client.get("/metrics").text
        rollback(Location(str(table)))
        wait_until(lambda: client.post("/rerank", json=ask).status_code == 422)
        stop.set()
        thread.join()
        assert set(codes) == {200}


def test_another_model_is_taken_over_and_a_broken_one_is_not(model_dir, tmp_path):
    """The new generation has other weights; then its model vanishes and the old one is served."""
    corpus = write_corpus(tmp_path / "c.jsonl", TEXTS[:10])
    table = tmp_path / "t.lance"
    encode_table(model_dir, corpus, table)
    other = make_checkpoint(tmp_path / "other", TEXTS, seed=7)
    with serving(table, "--refresh-s", "0.1", log=tmp_path / "log") as client:
        ask = {"query": "q", "document_ids": ["p0"]}
        first = client.post("/rerank", json=ask).json()["results"][0]["relevance_score"]
        encode_table(other, corpus, table, new_generation=True)
        publish(Location(str(table)))
        want = Reranker.open(str(table), model=str(other)).rerank("q", ["p0"])[0].score
        wait_until(
            lambda: (
                abs(client.post("/rerank", json=ask).json()["results"][0]["relevance_score"] - want)
                <= 1e-5
            )
        )
        assert abs(first - want) > 1e-4
        third = make_checkpoint(tmp_path / "third", TEXTS, seed=8)
        encode_table(third, corpus, table, new_generation=True)
        shutil.rmtree(third)
        publish(Location(str(table)))
        wait_until(lambda: "kalm_failed_swaps 0.0" not in client.get("/metrics").text)
        got = client.post("/rerank", json=ask).json()["results"][0]["relevance_score"]
        assert abs(got - want) <= 1e-5
        assert PassageTable.open(str(table)).version != client.get("/info").json()["table_version"]


def at_once(client, count, ask):
    """Post the same request from many threads; None where the connection was refused."""
    replies = [None] * count
    clients = [httpx.Client(base_url=client.base_url, timeout=HANG_S) for _ in range(count)]

    def post(i):
        refused = contextlib.suppress(httpx.ConnectError)  # the listening socket was closed
        with clients[i] as own, refused:
            replies[i] = own.post("/rerank", json=ask)

    threads = [threading.Thread(target=post, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies
