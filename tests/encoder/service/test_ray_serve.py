"""`kalm serve --ray`, a real local cluster."""

import os
import signal
import subprocess
import sys
import time

import httpx
import pytest

from kalm_encoder import Reranker
from tests.encoder.service.test_abandoned import (
    CONNECTIONS,
    LARGE,
    PAIRS,
    gone,
    idle,
    scored,
    send,
    wait_until_idle,
)
from tests.jobs.recipes.test_nginx import IDS, ended, load, wait_until_ready
from tests.support.commands import HANG_S
from tests.support.serving import free_port, wait_until
from tests.support.upgrades import ask_as_jdk, ask_with_curl, ask_with_java

pytest.importorskip("ray.serve")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(small_table):
    """The command and its port, ready."""
    port = free_port()
    command = [sys.executable, "-m", "jobs", "serve", str(small_table), "--ray", "--port"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["HF_HUB_OFFLINE"] = "1"
    with ended(subprocess.Popen([*command, str(port)], env=environment)) as process:
        wait_until_ready(port)
        yield process, port


def test_an_offer_of_http2_is_ignored_and_the_body_is_read(service, tmp_path):
    _, port = service
    ask = {"query": "q", "document_ids": IDS}
    for split in (True, False):
        for status, answer in ask_as_jdk(port, ask, split=split):
            assert (status, len(answer["results"])) == (200, len(IDS))
    assert len(ask_with_curl(port, ask)["results"]) == len(IDS)
    for answer in ask_with_java(port, ask, tmp_path):
        assert len(answer["results"]) == len(IDS)


def test_abandoned_requests_are_not_scored_to_their_end(service):
    _, port = service
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_S) as client:
        before = scored(client)
        sockets = [send(client, LARGE) for _ in range(CONNECTIONS)]
        wait_until(lambda: scored(client) > before)
        for one in sockets:
            one.close()
        wait_until(lambda: gone(client) == CONNECTIONS or idle(client))
        wait_until_idle(client)
        assert scored(client) - before < CONNECTIONS * PAIRS / 2


def test_scores_are_those_of_a_reranker_and_sigterm_answers_what_was_accepted(service, small_table):
    process, port = service
    with load(port, "states of a table") as answers:
        wait_until(lambda: len(answers) >= 16)
        process.send_signal(signal.SIGTERM)
        stopped = time.monotonic()
        assert process.wait(HANG_S) == 0
    accepted = [a for a in answers if a.began < stopped]
    assert len(accepted) >= 16
    assert {a.status for a in accepted} == {200}
    expected = {r.id: r.score for r in Reranker.open(small_table).rerank("states of a table", IDS)}
    for answer in accepted:
        found = {r["id"]: r["relevance_score"] for r in answer.results}
        assert found == pytest.approx(expected, abs=1e-5)
