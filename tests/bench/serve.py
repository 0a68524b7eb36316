"""The service under load: 64 clients for a minute, every answer compared with the offline score."""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import Counter

import httpx
import psutil

from kalm_encoder import Reranker
from tests.bench.data import FOLDER, bar, encode, tiny_checkpoint
from tests.bench.table import random_texts
from tests.support.serving import serving

QUERIES = ["index table", "which shard holds the passage", "decoder state ratio", "commit"]
PASSAGES, PER_REQUEST = 200, 20
CLIENTS, SECONDS = 64, 60.0


def main() -> list[str]:
    # float32, so that scores compare.
    uri = encode("serve", random_texts(PASSAGES), tiny_checkpoint(), store_dtype="float32")
    reranker = Reranker.open(uri)
    ids = [str(i) for i in range(PASSAGES)]
    right = {q: {r.id: r.score for r in reranker.rerank(q, ids)} for q in QUERIES}
    codes: Counter[int] = Counter()
    took: list[float] = []
    worst, memory, lock = 0.0, [], threading.Lock()
    with serving(uri, "--threads", "16", log=FOLDER / "serve.log") as server:
        process, stop = psutil.Process(server.process.pid), time.monotonic() + SECONDS

        def client(number: int) -> None:
            nonlocal worst
            rng = random.Random(number)
            with httpx.Client(base_url=server.base_url, timeout=60) as http:
                while time.monotonic() < stop:
                    query, some = rng.choice(QUERIES), rng.sample(ids, PER_REQUEST)
                    began = time.monotonic()
                    reply = http.post("/rerank", json={"query": query, "document_ids": some})
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
        batches = server.get("/metrics").text
    took.sort()
    quarter = len(memory) // 4
    growth = statistics.median(memory[-quarter:]) / statistics.median(memory[quarter : 2 * quarter])
    pairs = _metric(batches, "kalm_batch_pairs_sum") / _metric(batches, "kalm_batch_pairs_count")
    print(
        f"{CLIENTS} clients, {SECONDS:.0f} s: {dict(codes)}, {len(took) / SECONDS:.0f} requests/s, "
        f"p50 {took[len(took) // 2]:.0f} ms, p95 {took[int(len(took) * 0.95)]:.0f} ms, "
        f"{pairs:.0f} pairs a batch; largest difference from the offline score {worst:.1e}"
    )
    others = sum(n for code, n in codes.items() if code not in (200, 429))
    print(f"memory {memory[quarter] / 2**20:.0f} to {memory[-1] / 2**20:.0f} MiB")
    return [
        bar("serve_errors", others, "<=", 0),
        bar("serve_score_difference", worst, "<=", 1e-5),
        bar("serve_memory_growth", growth, "<=", 1.05),
    ]


def _metric(text: str, name: str) -> float:
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(name))
