"""All benchmarks; the last lines are one `bar NAME VALUE OP GOAL` a figure."""

import logging

from tests.bench import (
    dtypes,
    elastic,
    encode,
    gpu,
    memory,
    query,
    rerank,
    scale,
    serve,
    store,
    take,
)
from tests.bench.data import FOLDER, check_idle

logging.getLogger().setLevel(logging.WARNING)
FOLDER.mkdir(exist_ok=True)
check_idle()
bars = []
for bench in (
    memory,
    encode,
    gpu,
    rerank,
    query,
    store,
    scale,
    take,
    dtypes,
    serve,
    elastic,
):
    print(f"--- {bench.__name__}", flush=True)
    bars += bench.main()
print("\n".join(bars))
