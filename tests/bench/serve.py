"""The service: 64 clients for a minute, a third of whose requests are given up; abandoned work.

Every answer is compared with the offline score.
"""

from __future__ import annotations

import json
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable

import httpx
import psutil

from kalm_encoder import Reranker
from tests.bench.data import FOLDER, bar, encode, tiny_checkpoint
from tests.bench.table import random_texts
from tests.support.serving import serving

QUERIES = ["index table", "which shard holds the passage", "decoder state ratio", "commit"]
PASSAGES, PER_REQUEST = 1000, 20
CLIENTS, SECONDS = 64, 60.0
GIVEN_UP, LONGEST_PATIENCE_S = 1 / 3, 0.5
"""Share of the requests that are given up, and the longest time after which they are."""
ABANDONED = 16
IDS = [str(i) for i in range(PASSAGES)]


def main() -> list[str]:
    # float32, so that scores compare.
    uri = encode("serve", random_texts(PASSAGES), tiny_checkpoint(), store_dtype="float32")
    reranker = Reranker.open(uri)
    right = {q: {r.id: r.score for r in reranker.rerank(q, IDS)} for q in QUERIES}
    log = FOLDER / "serve.log"
    with serving(uri, "--threads", "16", log=log) as server:
        bars = _load(server, right)
    with serving(uri, "--threads", "16", log=log) as server:
        bars += _abandoned(server)
        bars += _sigterm(server)
    return bars


def _load(server: httpx.Client, right: dict[str, dict[str, float]]) -> list[str]:
    """Ask from many clients, some of whom do not wait; return the bars."""
    codes: Counter[int | str] = Counter()
    took: list[float] = []
    worst, memory, lock = 0.0, [], threading.Lock()
    process, stop = psutil.Process(server.process.pid), time.monotonic() + SECONDS
    cpu = sum(process.cpu_times()[:2])

    def client(number: int) -> None:
        nonlocal worst
        rng = random.Random(number)
        with httpx.Client(base_url=server.base_url, timeout=60) as http:
            while time.monotonic() < stop:
                query, some = rng.choice(QUERIES), rng.sample(IDS, PER_REQUEST)
                leaves = rng.random() < GIVEN_UP
                patience = rng.uniform(0, LONGEST_PATIENCE_S) if leaves else 60
                began, ask = time.monotonic(), {"query": query, "document_ids": some}
                try:
                    reply = http.post("/rerank", json=ask, timeout=patience)
                except httpx.TimeoutException:
                    with lock:
                        codes["given up" if leaves else "timed out"] += 1
                    continue
                seconds = time.monotonic() - began
                found = reply.json().get("results", [])
                off = [abs(r["relevance_score"] - right[query][r["id"]]) for r in found]
                with lock:
                    codes[reply.status_code] += 1
                    if reply.status_code == 200:
                        took.append(1000 * seconds)
                        assert len(found) == PER_REQUEST
                        worst = max(worst, *off)

    threads = [threading.Thread(target=client, args=(i,)) for i in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        memory.append(process.memory_info().rss)
        time.sleep(0.5)
    cpu = sum(process.cpu_times()[:2]) - cpu
    took.sort()
    quarter = len(memory) // 4
    growth = statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter])
    pairs = _metric(server, "kalm_batch_pairs_sum") / _metric(server, "kalm_batch_pairs_count")
    print(
        f"{CLIENTS} clients, {SECONDS:.0f} s: {dict(codes)}, {len(took) / SECONDS:.0f} requests/s, "
        f"p50 {took[len(took) // 2]:.0f} ms, p95 {took[int(len(took) * 0.95)]:.0f} ms, "
        f"{1000 * cpu / len(took):.1f} ms of CPU per answer, {pairs:.0f} pairs a batch; "
        f"largest difference from the offline score {worst:.1e}"
    )
    others = sum(n for code, n in codes.items() if code not in (200, 429, "given up"))
    print(f"memory {memory[quarter] / 2**20:.0f} to {memory[-1] / 2**20:.0f} MiB")
    return [
        bar("serve_errors", others, "<=", 0),
        bar("serve_score_difference", worst, "<=", 1e-5),
        bar("serve_memory_growth", growth, "<=", 1.05),
    ]


def _abandoned(server: httpx.Client) -> list[str]:
    """Compare a small request on the idle service with one right after much was abandoned."""

    def small() -> float:
        began = time.monotonic()
        assert server.post("/rerank", json={"query": "q", "document_ids": IDS[:10]}).is_success
        return 1000 * (time.monotonic() - began)

    idle = statistics.median(small() for _ in range(20))
    after = []
    for _ in range(5):
        _abandon(server)
        after.append(small())
        _until(lambda: _metric(server, "kalm_pending_requests") == 0)
    print(
        f"10 ids: {idle:.1f} ms idle, {', '.join(f'{ms:.1f}' for ms in after)} ms after abandoned"
    )
    return [bar("serve_after_abandoned_ratio", statistics.median(after) / idle, "<=", 3)]


def _sigterm(server: httpx.Client) -> list[str]:
    """Measure how long SIGTERM takes when nobody waits for what there is to do."""
    _abandon(server)
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    seconds = time.monotonic() - began
    print(f"SIGTERM with abandoned work alone: {seconds:.1f} s")
    return [bar("serve_sigterm_s", seconds, "<=", 2)]


def _abandon(server: httpx.Client) -> None:
    """Send requests of all passages, and close their connections when they are being scored."""
    body = json.dumps({"query": QUERIES[0] * 100, "document_ids": IDS})
    head = "POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    where = server.base_url.host, server.base_url.port
    before = _metric(server, "kalm_batch_pairs_sum")
    sockets = [socket.create_connection(where) for _ in range(ABANDONED)]
    for opened in sockets:
        opened.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    _until(lambda: _metric(server, "kalm_batch_pairs_sum") > before)
    for opened in sockets:
        opened.close()


def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def _metric(server: httpx.Client, name: str) -> float:
    lines = server.get("/metrics").text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name))
