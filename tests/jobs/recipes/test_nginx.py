"""jobs/recipes/nginx.conf, really run: a process is restarted under load and no request is lost."""

import json
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from kalm_encoder import Reranker
from tests.support import programs
from tests.support.commands import HANG_S, Command
from tests.support.serving import free_port, ready, wait_until

RECIPE = Path(__file__).parents[3] / "jobs" / "recipes" / "nginx.conf"
IDS = [f"p{i}" for i in range(12)]

pytestmark = pytest.mark.slow


class Answer(NamedTuple):
    began: float
    status: int | str
    results: list[dict[str, Any]] | None


@contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.terminate()
        process.wait(HANG_S)


def serve(table, port):
    return Command("serve", table, "--port", port)


def wait_until_ready(port):
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        wait_until(lambda: ready(client))


def answered(port):
    """How many requests one process says it answered."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as page:
        lines = [line.decode() for line in page]
    return sum(float(x.split()[-1]) for x in lines if 'requests_total{path="/rerank"' in x)


@contextmanager
def load(port, query, num_threads=16):
    """Ask without pause from many threads; yields the list of answers."""
    answers, stop = [], threading.Event()
    body = json.dumps({"query": query, "document_ids": IDS}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/rerank", body, headers)

    def ask():
        while not stop.is_set():
            began, results = time.monotonic(), None
            try:
                with urllib.request.urlopen(request, timeout=90) as reply:
                    status, results = reply.status, json.load(reply)["results"]
            except urllib.error.HTTPError as error:
                status = error.code
            except OSError as error:
                status = repr(error)
            answers.append(Answer(began, status, results))

    threads = [threading.Thread(target=ask) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextmanager
def behind_nginx(table, folder):
    """Run two processes behind nginx; yield nginx's port, the processes and their ports."""
    programs.require("nginx")
    front, *ports = (free_port() for _ in range(3))
    recipe = RECIPE.read_text()
    for old, new in zip((8080, 8081, 8082), (front, *ports), strict=True):
        assert f"127.0.0.1:{old}" in recipe
        recipe = recipe.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    config = folder / "nginx.conf"
    config.write_text(recipe)
    with ExitStack() as stack:
        processes = [stack.enter_context(ended(serve(table, port))) for port in ports]
        for port in ports:
            wait_until_ready(port)
        command = ["nginx", "-p", str(folder), "-c", str(config), "-g", "daemon off;"]
        stack.enter_context(ended(subprocess.Popen(command)))
        wait_until_ready(front)
        yield front, processes, ports


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_restart_under_load_loses_no_request(small_table, tmp_path, number):
    with (
        behind_nginx(small_table, tmp_path) as (front, processes, ports),
        load(front, "states of a table") as answers,
    ):
        wait_until(lambda: len(answers) >= 16)
        processes[0].send_signal(number)
        processes[0].wait(HANG_S)
        with ended(serve(small_table, ports[0])):
            wait_until_ready(ports[0])
            wait_until(lambda: answered(ports[0]) >= 16)
    assert {answer.status for answer in answers} == {200}
    expected = {r.id: r.score for r in Reranker.open(small_table).rerank("states of a table", IDS)}
    for answer in answers:
        found = {r["id"]: r["relevance_score"] for r in answer.results}
        assert found == pytest.approx(expected, abs=1e-5)
