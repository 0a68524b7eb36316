"""Runs the benchmarks; the last lines are one `bar NAME VALUE OP GOAL` per figure.

python -m tests.bench.run                  all of them, about 30 minutes
python -m tests.bench.run --short          the main bars in a few minutes, to compare two trees
python -m tests.bench.run rerank table     only these
"""

from __future__ import annotations

import argparse
import logging

from tests.bench import (
    codecs,
    disk_cache,
    elastic,
    encode,
    long_documents,
    match_text,
    memory,
    planning,
    rerank,
    scale,
    serve,
    shapes,
    steps,
    table,
    take,
    traces,
)
from tests.bench.data import FOLDER, warn_if_busy
from tests.bench.gpu_check import check, host_ceiling

BENCHES = {
    "memory": memory.main,
    "encode": encode.main,
    "gpu": check.bars,
    "host": host_ceiling.bars,
    "rerank": rerank.main,
    "shapes": shapes.main,
    "table": table.main,
    "documents": long_documents.main,
    "take": take.main,
    "texts": match_text.main,
    "disk_cache": disk_cache.main,
    "codecs": codecs.main,
    "scale": scale.main,
    "serve": serve.main,
    "traces": traces.main,
    "elastic": elastic.main,
    "planning": planning.main,
    "steps": steps.main,
}
SHORT = {"encode": encode.short, "rerank": rerank.short, "take": take.short}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="default: all")
    parser.add_argument("--short", action="store_true", help="fewer and smaller measurements")
    chosen = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    FOLDER.mkdir(exist_ok=True)
    warn_if_busy()
    benches = {**BENCHES, **SHORT} if chosen.short else BENCHES
    bars = []
    for name in chosen.names or (SHORT if chosen.short else BENCHES):
        print(f"--- {name}", flush=True)
        bars += benches[name]()
    print("\n".join(bars))


if __name__ == "__main__":
    main()
