"""Reads of 100 rows from an object store that takes 50 ms per request, through a warm disk cache.

They are compared with reads of the same rows from a table on the local disk. Both have the index in
memory, as the service has.
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
from pathlib import Path

from kalm_encoder import DiskCache, PassageTable
from tests.bench.data import FOLDER, bar, spread, timed
from tests.bench.take import IDS, NANO_DIM, NANO_STATES, open_table, random_table
from tests.support.s3_server import serve

ROWS, REQUESTS = 2_000, 200
REQUEST_S = 0.05


def main() -> list[str]:
    uri = random_table(ROWS, dim=NANO_DIM, states=NANO_STATES)
    local = open_table(uri, indexed=True)
    rng = random.Random(0)
    requests = [[f"doc-{n}" for n in rng.sample(range(ROWS), IDS)] for _ in range(REQUESTS)]
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder, serve(Path(folder, "s3")) as s3:
        shutil.copytree(uri, s3.folder / "bucket" / "t.lance")
        remote = PassageTable.open(
            "s3://bucket/t.lance",
            storage_options=s3.options,
            index_bytes=1 << 20,
            disk_cache=DiskCache(Path(folder, "cache"), 1 << 30),
        )
        s3.faults({"action": "delay", "count": 10**9, "seconds": REQUEST_S})
        first = [1000 * timed(lambda ids=ids: remote.take(ids)) for ids in requests]
        s3.faults({"action": "delay", "count": 10**9, "seconds": REQUEST_S})
        times: dict[str, list[float]] = {"disk cache": [], "local table": []}
        for ids in requests:
            for name, table in (("disk cache", remote), ("local table", local)):
                times[name].append(1000 * timed(lambda table=table, ids=ids: table.take(ids)))
        made = len(s3.stats()["requests"])
    print(f"first pass from the store: {spread(first)} ms")
    for name, took in times.items():
        print(f"second pass, {name}: {spread(took)} ms")
    ratio = statistics.median(times["disk cache"]) / statistics.median(times["local table"])
    return [bar("disk_cache_take", ratio, "<=", 1.3), bar("disk_cache_requests", made, "<=", 0)]
