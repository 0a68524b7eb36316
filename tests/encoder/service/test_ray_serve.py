"""`kalm serve --ray`, a real local cluster."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kalm_encoder import Reranker
from tests.jobs.recipes.test_nginx import IDS, ended, load, wait_until_ready
from tests.support.commands import HANG_S
from tests.support.serving import free_port, wait_until

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
