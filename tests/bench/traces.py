"""What traces cost a service: requests with and without them in turn, to one process over HTTP."""

from __future__ import annotations

import random
import statistics
import time

import httpx
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kalm_encoder import tracing
from kalm_encoder.service.settings import Settings
from tests.bench.data import bar, encode, spread, tiny_checkpoint
from tests.bench.serve import IDS, PASSAGES, QUERIES
from tests.bench.table import random_texts
from tests.support.serving import serving_here

BLOCKS, REQUESTS_PER_BLOCK, PER_REQUEST = 40, 4, 100


def main() -> list[str]:
    uri = encode("traces", random_texts(PASSAGES), tiny_checkpoint())
    rng = random.Random(0)
    wall: dict[bool, list[float]] = {False: [], True: []}
    cpu: dict[bool, list[float]] = {False: [], True: []}
    num_spans = 0
    with serving_here(Settings(uri)) as (client, _):
        for block in range(2 * BLOCKS):
            # Which comes first changes, so that neither gains from what the other left behind.
            traced = block % 4 in (1, 2)
            exporter = InMemorySpanExporter()
            if traced:
                tracing.start("bench", exporter)
            began, used = time.perf_counter(), time.process_time()
            for _ in range(REQUESTS_PER_BLOCK):
                _ask(client, rng)
            if block >= 4:  # the first ones warm up
                wall[traced].append(1000 * (time.perf_counter() - began) / REQUESTS_PER_BLOCK)
                cpu[traced].append(1000 * (time.process_time() - used) / REQUESTS_PER_BLOCK)
            tracing.stop(60)
            num_spans += len(exporter.get_finished_spans())
    print(f"{num_spans / BLOCKS / REQUESTS_PER_BLOCK:.1f} spans per request of {PER_REQUEST} ids")
    for name, of in (("without traces", False), ("with traces", True)):
        print(f"{name}: {spread(wall[of])} ms, {spread(cpu[of])} ms of CPU per request")
    return [
        bar("traces_overhead_ratio", _ratio(wall), "<=", 1.02),
        bar("traces_overhead_cpu_ratio", _ratio(cpu), "<=", 1.02),
    ]


def _ask(client: httpx.Client, rng: random.Random) -> None:
    ask = {"query": rng.choice(QUERIES), "document_ids": rng.sample(IDS, PER_REQUEST)}
    assert client.post("/rerank", json=ask).status_code == 200


def _ratio(figures: dict[bool, list[float]]) -> float:
    return statistics.median(figures[True]) / statistics.median(figures[False])
