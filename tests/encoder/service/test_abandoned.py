"""Requests that nobody waits for any more, by real sockets: the device is not used for them."""

import http.client
import json
import re
import signal
import socket
import threading

import httpx
import pytest
import uvicorn

from kalm_encoder import Reranker
from kalm_encoder.service import metrics
from kalm_encoder.service.app import create_app
from kalm_encoder.service.settings import Settings
from tests.conftest import make_texts
from tests.support.commands import HANG_S
from tests.support.serving import free_port, serving, wait_until

CONNECTIONS = 16
QUERY = "token state " * 400  # cut to 512 tokens: a batch holds few pairs
CASCADE = [[16, 60], [8, 60], [4, 60], [2, None]]
PAIRS = 4 * 60
"""Pairs of one request below."""
PAIRS_PER_BATCH = 4096 // 512
IDS = [f"p{i}" for i in range(60)]
LARGE = {"query": QUERY, "document_ids": IDS, "cascade": CASCADE}
SMALL = {"query": "q", "document_ids": IDS[:10]}


@pytest.fixture(scope="module")
def client(small_table):
    with serving(small_table, "--with-encoder", "--timeout-s", HANG_S) as client:
        yield client


def send(client, ask, *, path="/rerank", length=None):
    """Send a request through a socket of its own, and return the socket."""
    body = json.dumps(ask).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    opened = socket.create_connection((client.base_url.host, client.base_url.port), HANG_S)
    opened.sendall(f"{head}Content-Length: {length or len(body)}\r\n\r\n".encode() + body)
    return opened


def metric(client, name):
    text = client.get("/metrics").text
    return sum(float(x) for x in re.findall(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE))


def gone(client, path="/rerank"):
    return metric(client, f'kalm_requests_total{{path="{path}",status="499"}}')


def idle(client):
    return metric(client, "kalm_pending_requests") == 0


def scored(client):
    return metric(client, "kalm_batch_pairs_sum")


def wait_until_idle(client):
    wait_until(lambda: idle(client))
    assert metric(client, 'kalm_queued{kind="pairs"}') == 0
    assert metric(client, 'kalm_queued{kind="texts"}') == 0


def test_abandoned_requests_leave_queue_batches_and_threads(client):
    before, gone_before = scored(client), gone(client)
    sockets = [send(client, LARGE) for _ in range(CONNECTIONS)]
    wait_until(lambda: scored(client) > before)
    for one in sockets:
        one.close()
    assert client.post("/rerank", json=SMALL).status_code == 200
    wait_until(lambda: gone(client) - gone_before == CONNECTIONS or idle(client))
    assert gone(client) - gone_before == CONNECTIONS
    when_gone = scored(client)
    wait_until_idle(client)
    assert scored(client) - when_gone <= PAIRS_PER_BATCH
    assert scored(client) - before < CONNECTIONS * PAIRS / 2
    # What is left of them takes no place: as many as may wait are accepted.
    assert client.post("/rerank", json=SMALL).status_code == 200


def test_an_abandoned_request_of_texts_is_not_encoded_to_its_end(client):
    before, gone_before = metric(client, "kalm_batch_texts_sum"), gone(client)
    texts = make_texts(1000, longest=2000)
    opened = send(client, {"query": "q", "documents": texts})
    wait_until(lambda: metric(client, "kalm_batch_texts_sum") > before)
    opened.close()
    wait_until(lambda: gone(client) > gone_before or idle(client))
    wait_until_idle(client)
    assert metric(client, "kalm_batch_texts_sum") - before < len(texts) / 2
    assert gone(client) == gone_before + 1


def test_an_abandoned_list_of_queries_is_not_scored_to_its_end(client):
    before, gone_before = scored(client), gone(client, "/score")
    queries = [f"{QUERY} {number}" for number in range(1000)]
    ask = {"queries": queries, "document_ids": IDS[:1] * 1000}
    opened = send(client, ask, path="/score")
    wait_until(lambda: scored(client) > before)
    opened.close()
    wait_until(lambda: gone(client, "/score") > gone_before or idle(client))
    wait_until_idle(client)
    assert scored(client) - before < len(queries) / 2


def test_after_a_504_nothing_more_is_scored_for_that_request(small_table):
    with serving(small_table, "--timeout-s", "0.3") as client:
        sockets = [send(client, LARGE) for _ in range(CONNECTIONS)]
        replies = [one.recv(1 << 16).decode() for one in sockets]
        when_answered = scored(client)
        assert {reply.split()[1] for reply in replies} == {"504"}
        wait_until_idle(client)
        assert scored(client) - when_answered <= PAIRS_PER_BATCH


def test_a_body_that_never_arrives_is_given_up(small_table):
    with serving(small_table, "--timeout-s", "0.3") as client:
        opened = send(client, SMALL, length=10_000)
        with opened.makefile("rb") as reply:
            text = reply.read().decode().lower()  # to the end of the connection
        assert text.startswith("http/1.1 408 ")
        assert "connection: close" in text
        waiting = send(client, SMALL, length=10_000)
        client.process.send_signal(signal.SIGTERM)
        assert client.process.wait(HANG_S) == 0, "it waits for what never comes"
        waiting.close()


def test_sigterm_does_not_wait_for_abandoned_work(small_table):
    settings = Settings(str(small_table))
    app = create_app(settings)
    server = uvicorn.Server(uvicorn.Config(app, port=free_port(), log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started and app.state.live.current)
    with httpx.Client(base_url=f"http://127.0.0.1:{server.config.port}") as client:
        before = scored(client)
        sockets = [send(client, LARGE) for _ in range(CONNECTIONS)]
        wait_until(lambda: scored(client) > before)
    for one in sockets:
        one.close()
    server.should_exit = True  # what uvicorn does on SIGTERM
    thread.join()
    after = next(m.samples for m in metrics.BATCH_PAIRS.collect())
    total = next(s.value for s in after if s.name == "kalm_batch_pairs_sum")
    assert total - before < CONNECTIONS * PAIRS / 2


def test_who_stays_gets_the_offline_scores_among_those_who_leave(client, small_table):
    right = {r.id: r.score for r in Reranker.open(str(small_table)).rerank("token state", IDS)}
    sockets = [send(client, {"query": "token state", "document_ids": IDS}) for _ in range(12)]
    for one in sockets[::3]:
        one.close()
    for one in sockets[1::3] + sockets[2::3]:
        reply = http.client.HTTPResponse(one)
        reply.begin()
        assert reply.status == 200
        found = {r["id"]: r["relevance_score"] for r in json.load(reply)["results"]}
        assert found == pytest.approx(right, abs=1e-5)
