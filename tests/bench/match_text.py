"""Looks texts up in a table of a million rows of random states.

A look-up reads the ids and the text hashes of the rows that it finds, and nothing if it finds none.
"""

from __future__ import annotations

import random

from tests.bench.data import bar, spread, timed
from tests.bench.take import INDEX_LIMIT_BYTES, LARGE, open_table, random_table

LOOK_UPS, TEXTS = 100, 100


def main() -> list[str]:
    table = open_table(random_table(LARGE, dim=64, states=8), indexed=False)
    seconds = timed(lambda: table.load_index(INDEX_LIMIT_BYTES, match_text=True))
    index, order = table.index, table.by_text
    assert index is not None and order is not None
    print(f"index of {LARGE:,} rows: {index.nbytes / LARGE:.1f} bytes per row, and "
          f"{order.nbytes / LARGE:.1f} for texts; {seconds:.1f} s")  # fmt: skip
    rng = random.Random(0)
    drawn = [rng.sample(range(LARGE), TEXTS) for _ in range(LOOK_UPS + 5)]
    stored = [[f"doc-{n}" for n in numbers] for numbers in drawn]  # their texts are their ids
    missing = [[f"other {n}" for n in numbers] for numbers in drawn]
    for name, texts, found in (("stored", stored, TEXTS), ("other", missing, 0)):
        assert all(len(table.ids_by_text(asked)) == found for asked in texts[:5])  # warm
        times = [1000 * timed(lambda a=asked: table.ids_by_text(a)) for asked in texts[5:]]
        print(f"{TEXTS} {name} texts of {LARGE:,} rows: {spread(times)} ms")
    return [bar("match_text_bytes_per_row", order.nbytes / LARGE, "<=", 4)]
