"""Reads of 100 random rows from small and large tables of random states, and their checksums.

The service holds the index in memory, so the bar is measured with it.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa

from kalm_encoder import PassageStates, PassageTable
from kalm_encoder.matryoshka import PackedStates
from kalm_encoder.table.checksums import states_checksum
from kalm_encoder.table.reader import LIVE_TAG
from kalm_encoder.table.rows import build_rows
from kalm_encoder.table.spec import TableSpec
from tests.bench.data import FOLDER, bar, spread, timed

SMALL, LARGE, TAKES, IDS = 10_000, 1_000_000, 300, 100
INDEX_LIMIT_BYTES = 1 << 30
NANO_DIM, NANO_STATES = 640, 32
"""Width of Nano's states, and their number for a passage of 128 tokens at ratio 4."""


def main() -> list[str]:
    ratio = _ratio(LARGE, indexed=True)
    print(f"without the index in memory: {_ratio(LARGE, indexed=False):.2f}")
    return [bar("take_million_rows", ratio, "<=", 1.5), _checksum_share()]


def short() -> list[str]:
    return [bar("take_100k_rows", _ratio(100_000, indexed=True), "<=", 1.5), _checksum_share()]


def _ratio(large: int, *, indexed: bool) -> float:
    """Return the median time of a take from a large table, over one from a small table."""
    tables = {
        rows: open_table(random_table(rows, dim=64, states=8), indexed) for rows in (SMALL, large)
    }
    took: dict[int, list[float]] = {rows: [] for rows in tables}
    rng = random.Random(0)
    for i in range(TAKES + 5):
        # In another order each time: a take is slower behind one that read much.
        for rows in rng.sample(list(tables), len(tables)):
            ids = [f"doc-{n}" for n in rng.sample(range(rows), IDS)]
            seconds = timed(lambda table=tables[rows], ids=ids: table.take(ids))
            if i >= 5:  # warm
                took[rows].append(1000 * seconds)
    for rows, times in took.items():
        print(f"{IDS} random ids of {rows:,} rows: {spread(times)} ms")
    return statistics.median(took[large]) / statistics.median(took[SMALL])


def _checksum_share() -> str:
    """Return the share of a take's time that goes into checksums, at Nano's width."""
    table = PassageTable.open(random_table(IDS, dim=NANO_DIM, states=NANO_STATES))
    ids = [f"doc-{n}" for n in range(IDS)]
    passages = table.take(ids)

    def checksums() -> None:
        for i, passage in zip(ids, passages, strict=True):
            states_checksum(i, passage.num_tokens, passage.truncated, passage.states)

    takes = [timed(lambda: table.take(ids)) for _ in range(20)]
    sums = [timed(checksums) for _ in range(20)]
    print(f"take {spread([1000 * t for t in takes])} ms, of which checksums "
          f"{spread([1000 * s for s in sums])} ms")  # fmt: skip
    return bar("checksum_share", statistics.median(sums) / statistics.median(takes), "<=", 0.1)


def open_table(uri: str, indexed: bool) -> PassageTable:
    table = PassageTable.open(uri)
    if indexed:
        table.load_index(INDEX_LIMIT_BYTES)
    return table


def random_table(rows: int, *, dim: int, states: int, store_dtype: str = "float16") -> str:
    """Write a table of random states, once; return its address."""
    uri = str(FOLDER / f"take{rows}x{states}x{dim}-{store_dtype}.lance")
    if Path(uri).exists():
        return uri
    spec = TableSpec("none", None, "none", dim, 1024, (4,), store_dtype, keep_text=False)
    rng = np.random.default_rng(0)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, SMALL):
            drawn = rng.standard_normal((min(SMALL, rows), states, dim)).astype(np.float32)
            ids = [f"doc-{start + i}" for i in range(len(drawn))]
            passages = PackedStates.of([PassageStates(s, 4 * states - 2, False) for s in drawn])
            yield from build_rows(spec, ids, ids, passages, f"shard-{start}").to_batches()

    dataset = lance.write_dataset(
        pa.RecordBatchReader.from_batches(spec.schema(), batches()),
        uri,
        data_storage_version="2.2",
        enable_stable_row_ids=True,
    )
    dataset.create_scalar_index("id", "BTREE")
    dataset = lance.dataset(uri)
    dataset.tags.create(LIVE_TAG, dataset.version)
    return uri
